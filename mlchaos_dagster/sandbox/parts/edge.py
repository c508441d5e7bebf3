"""The edge: TLS and credentials in front of the gateway, and the audit log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import Part, Process, View

if TYPE_CHECKING:
    from mlchaos_dagster.sandbox.supervisor import Supervisor


def _settings(supervisor: Supervisor, name: str) -> dict[str, Any]:
    return {"sandbox": str(supervisor.directory)} if name == "edge" else {}


def _facts(supervisor: Supervisor) -> dict[str, Any]:
    """Where users find the edge, what they trust and what they send; nothing before it has opened its port."""
    directory = supervisor.directory / "edge"
    try:
        port = int((directory / "port").read_text())
    except (OSError, ValueError):
        return {}
    return {
        "edge": {
            "url": f"https://127.0.0.1:{port}",
            "ca": str(directory / "trust.pem"),
            "credential_file": str(directory / "authorization"),
        }
    }


def _read(view: View) -> dict[str, float]:
    edge, gateway = view.states.get("edge", {}), view.states.get("gateway", {})
    found = {
        "certificate_age": edge.get("certificate_age_s"),
        "certificates_served": edge.get("certificates"),
        "credentials_refused": edge.get("credentials_refused"),
        "audit_intact": edge.get("audit_intact"),
        "audit_entries": edge.get("audit_entries"),
        "isolated_replicas": len(gateway["isolated"]) if "isolated" in gateway else None,
    }
    return {name: float(value) for name, value in found.items() if value is not None}


PART = Part(
    name="edge",
    describe="TLS and credentials in front of the gateway, and the audit log",
    processes=(Process("edge", "edge"),),
    peers={"edge": {"gateway": "gateway"}},
    signals=(
        "certificate_age",
        "certificates_served",
        "credentials_refused",
        "audit_intact",
        "audit_entries",
        "isolated_replicas",
    ),
    read=_read,
    watches=("gateway",),
    settings=_settings,
    facts=_facts,
)
