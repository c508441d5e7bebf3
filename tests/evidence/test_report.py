"""The report is one file that needs nothing else, says everything, and lets no text of a spec become HTML."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mlchaos_dagster.domain.environment import Environment
from mlchaos_dagster.domain.outcome import Outcome
from mlchaos_dagster.domain.spec import Experiment
from mlchaos_dagster.engine.files import write_atomic
from mlchaos_dagster.errors import StoreError
from mlchaos_dagster.evidence.document import experiment_document
from mlchaos_dagster.evidence.json_output import run_json
from mlchaos_dagster.evidence.masking import MASK, mask_text, mask_value, secrets_in
from mlchaos_dagster.evidence.report import backlog_entry, render_html, render_markdown, write_report
from mlchaos_dagster.evidence.spec_text import spec_yaml
from mlchaos_dagster.evidence.terminal import end_block
from mlchaos_dagster.judgement.verdict import judge

from .builders import Run, aborted, all_runs, deviated, environment, experiment, held

RUNS = all_runs()
EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """Tags with their attributes, and the text a reader sees."""

    VOID = {"meta", "br", "hr", "img", "link", "input"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.stack: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack.pop() == tag, f"</{tag}> does not fit"

    def handle_data(self, data: str) -> None:
        if "style" not in self.stack:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def pages() -> dict[str, Page]:
    return {name: Page(render_html(*run)) for name, run in RUNS.items()}


@pytest.mark.req("R2-04")
@pytest.mark.parametrize("name", RUNS)
def test_page_is_whole_self_contained_and_shows_no_missing_value(name: str, pages: dict[str, Page]) -> None:
    page = pages[name]
    assert not page.stack
    assert not re.search(r"\b(nan|None|inf|Undefined)\b", page.text), page.text
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "img"), tag
        for key, value in attributes.items():
            assert not re.match(r"\s*(https?:)?//", value), (tag, key, value)
            assert not key.startswith("on")
    html = page.source
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert "http://" not in html
    assert "https://" not in html


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("held", ["✔ HELD", "Before, during, after", "95 % interval", "Recovery ✔ within its limit", "Expected and seen"]),
        ("held", ["✔ proven, read back from the target", "3 of 3 replicas ready", "asked 34 %, at most 10; taken 1 of 3"]),
        ("held", ["mlchaos run serving-pod-failure", "seed 42", "dagster 1.13.27", "started by ada@laptop", "mlchaos recover"]),
        ("deviated", ["✘ DEVIATED", "> 30 s (not seen)", "hatched", "For the backlog", "breaker_state reaches open"]),
        ("aborted", ["■ ABORTED", "Breach → clean in 0.42 s", "abort: error_rate was 31 %", "not measured"]),
        ("refused_guard", ["⊘ REFUSED", "4 % left", "at least 10 % left", "Nothing was injected", "nothing was measured"]),
        ("refused_unsteady", ["⊘ REFUSED", "does not hold: 94.2 %", "baseline 10 s"]),
        ("unclean", ["‼ UNCLEAN", "THE FAULT MAY STILL BE LIVE", "mlchaos-7f3a91c2", "NOT PROVEN", "ml-platform@example.com"]),
        ("shadow", ["SHADOW-HELD", "nothing was injected"]),
        ("inconclusive", ["INCONCLUSIVE", "a window of 90 s would do"]),
        ("error", ["! ERROR", "No space left on device"]),
    ],
)  # fmt: skip
def test_page_says(name: str, needed: list[str], pages: dict[str, Page]) -> None:
    for words in needed:
        assert words in pages[name].text, words


def test_only_unclean_and_deviated_have_their_parts(pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        assert ("MAY STILL BE LIVE" in page.text) == (name == "unclean")
        assert ("For the backlog" in page.text) == (name == "deviated")


def test_text_of_a_spec_never_becomes_html() -> None:
    run = deviated()
    spec = run.record.experiment.model_copy(update={"hypothesis": EVIL, "title": EVIL, "owner": EVIL})
    target = run.record.environment.targets["feature-store"].model_copy(update={"select": EVIL, "describe": EVIL})
    env = run.record.environment.model_copy(update={"targets": {"feature-store": target}, "title": EVIL})
    assert run.record.fault
    record = run.record.model_copy(
        update={
            "experiment": spec, "environment": env, "started_by": EVIL, "error": EVIL, "incidents": (EVIL,),
            "fault": run.record.fault.model_copy(update={"targets": (EVIL,), "evidence": (EVIL,), "lease_id": EVIL}),
            "versions": {EVIL: EVIL},
        }
    )  # fmt: skip
    verdict = run.verdict.model_copy(update={"reasons": (EVIL,), "advice": EVIL})
    html = render_html(record, run.samples, verdict, [(EVIL, Outcome.HELD, EVIL)])
    page = Page(html)
    assert not any(tag in ("script", "img") for tag, _ in page.tags)
    assert "<script>" in page.text, "shown as text"
    markdown = render_markdown(record, run.samples, verdict, picture=False)
    assert "<script" not in markdown
    assert "<script" not in experiment_document(spec, env)


def test_mathtext_and_odd_names_do_not_break_the_picture() -> None:
    run = held()
    assert run.record.fault
    fault = run.record.fault.model_copy(update={"targets": ("a$\\frac{b$", "x_{$")})
    assert "<svg" in render_html(run.record.model_copy(update={"fault": fault}), run.samples, run.verdict)


def test_secrets_are_masked_by_key_and_wherever_they_turn_up() -> None:
    run = held()
    record = run.record.model_copy(update={"incidents": ("error: 401, sent s3cr3t-value-42",)})
    for text in (
        render_html(record, run.samples, run.verdict),
        render_markdown(record, run.samples, run.verdict, picture=False),
    ):
        assert "s3cr3t" not in text
    assert f"Authorization: {MASK}" in render_html(*held())


@pytest.mark.parametrize("key", ["Authorization", "X-Api-Key", "client_secret", "PASSWORD", "auth-token", "api_key"])
def test_mask_by_key(key: str) -> None:
    assert mask_value({"headers": {key: "abcd1234", "Accept": "json"}}) == {"headers": {key: MASK, "Accept": "json"}}
    assert mask_value({key: "env:SECRET_NAME"}) == {key: "env:SECRET_NAME"}
    assert secrets_in({key: "Bearer abcd1234"}) == {"Bearer abcd1234", "abcd1234"}


@pytest.mark.parametrize(
    "text",
    ["https://ada:hunter22@db.example/x", "password=hunter22", "Authorization: Bearer hunter22x", "api_key: hunter22"],
)
def test_mask_in_text(text: str) -> None:
    assert "hunter22" not in mask_text(text)
    assert mask_text("fencing token was older than 7 s") == "fencing token was older than 7 s"


def test_history_is_a_strip_of_links_to_reports_beside_this_one() -> None:
    history = [("aa11", Outcome.DEVIATED, 1.763e9), ("bb22", "SHADOW-HELD", "2025-11-20"), ("cc33", "HELD", 1.763e9)]
    page = Page(render_html(*held(), history))
    links = [a for tag, a in page.tags if tag == "a"]
    assert [a["href"] for a in links] == ["aa11.html", "bb22.html", "cc33.html"]
    assert "DEVIATED" in links[0]["title"]
    assert "2025-11-13" in links[0]["title"]
    many = Page(render_html(*held(), [(f"r{i}", "HELD", 0.0) for i in range(50)]))
    hrefs = [a["href"] for tag, a in many.tags if tag == "a"]
    assert hrefs == [f"r{i}.html" for i in range(20, 50)], "the newest thirty"


def test_write_report_is_atomic_and_whole(tmp_path: Path) -> None:
    path = write_report(tmp_path / "reports" / "7f3a91c2.html", *aborted())
    assert path.read_text().startswith("<!DOCTYPE html>")
    assert path.read_text().rstrip().endswith("</html>")
    assert [p.name for p in path.parent.iterdir()] == ["7f3a91c2.html"]
    with pytest.raises(StoreError):
        write_report(path / "under-a-file.html", *aborted())
    write_atomic(path, b"old")
    assert path.read_bytes() == b"old"


def test_markdown_has_table_and_small_picture() -> None:
    text = render_markdown(*held(), picture=True)
    assert "## ✔ HELD  serving-pod-failure · sandbox" in text
    assert "| availability | 100.0 % | 99.4 % | 100.0 % | −0.6 pp [−1.2, −0.1] | ≥ 99 % | ✔ |" in text
    found = re.search(r"data:image/png;base64,([A-Za-z0-9+/=]+)\)", text)
    assert found
    png = base64.b64decode(found[1])
    assert len(png) <= 150_000
    assert Image.open(io.BytesIO(png)).width == 900
    assert "data:image" not in render_markdown(*held(), picture=False)


@pytest.mark.parametrize("name", RUNS)
def test_markdown_shows_no_missing_value(name: str) -> None:
    text = render_markdown(*RUNS[name], picture=False)
    assert not re.search(r"\b(nan|None|inf)\b", text), text


def test_spec_in_the_report_loads_to_the_same_experiment() -> None:
    for run in (held(), deviated()):
        assert Experiment.model_validate(yaml.safe_load(spec_yaml(run.record.experiment))) == run.record.experiment
    fault = {"kind": "network_latency", "latency": "500ms", "jitter": "100ms"}
    odd = experiment(fault=fault, expect=[{"signal": "x", "reaches": 1.5}], target="feature-store")
    assert Experiment.model_validate(yaml.safe_load(spec_yaml(odd))) == odd
    env = environment()
    assert Environment.model_validate(yaml.safe_load(spec_yaml(env, mask=False))) == env


def test_backlog_entry_only_for_a_real_deviation() -> None:
    entries = {name: backlog_entry(run.record, run.verdict) for name, run in RUNS.items()}
    assert [name for name, text in entries.items() if text] == ["deviated"]
    assert "breaker" in entries["deviated"]
    shadow = RUNS["deviated"]
    assert backlog_entry(shadow.record.model_copy(update={"shadow": True}), shadow.verdict) == ""


def test_document_has_every_part_of_r2_01() -> None:
    text = experiment_document(experiment(), environment(), by_hand=[("kubectl delete networkpolicy x", "removes it")])
    for part in ("Hypothesis", "Scope", "Prerequisites", "Success criteria", "Steps", "Metrics", "Rollback plan"):
        assert f"## {part}\n" in text
    for fact in (
        "prediction-service: `inference-*`", "15 s here (asked for 10 m", "34 %, never more than 10", "sandbox",
        "- [ ] Nobody is deploying", "availability ≥ 99 %", "error rate above 1 % for 3 s", "mlchaos stop --all",
        "mlchaos recover --environment sandbox", "kubectl delete networkpolicy x", "**restart**",
    ):  # fmt: skip
        assert fact in text, fact
    assert "s3cr3t" not in text


def test_a_run_without_anything_still_has_a_page() -> None:
    run = RUNS["refused_guard"]
    record = run.record.model_copy(update={"guards": (), "incidents": (), "versions": {}, "started_by": ""})
    text = Page(render_html(*Run(record, run.samples, run.verdict))).text
    assert "No guard was asked" in text
    assert "versions not recorded" in text


@pytest.mark.parametrize("name", RUNS)
def test_real_judgement_of_these_records_reads_well(name: str) -> None:
    """The words also fit what the judgement says today, not only what these builders made up."""
    run = RUNS[name]
    verdict = judge(run.record, run.samples)
    text = Page(render_html(run.record, run.samples, verdict)).text
    block = end_block(run.record, verdict, width=110)
    json.dumps(run_json(run.record, verdict), allow_nan=False)
    for said in (text, block, render_markdown(run.record, run.samples, verdict, picture=False)):
        assert not re.search(r"\b(nan|None|inf)\b", said), said
    expected = {"refused_guard": "REFUSED", "unclean": "UNCLEAN", "error": "ERROR", "aborted": "ABORTED"}
    assert block.startswith(expected.get(name, ""))
