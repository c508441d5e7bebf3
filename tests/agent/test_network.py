"""The network agent without a kernel: message formats, the wandering delay, rules as text, plans, what counts as an effect."""

from __future__ import annotations

import statistics

import pytest

from mlchaos_dagster.agent import network_probe, network_rules
from mlchaos_dagster.agent import network_queue as queue
from mlchaos_dagster.agent.network_home import at_home, gateways, name_servers
from mlchaos_dagster.agent.network_keeper import Keeper
from mlchaos_dagster.agent.network_plan import Plan, short_name
from mlchaos_dagster.agent.network_probe import Prober, Seen, effect
from mlchaos_dagster.agent.network_rules import Counted, counted, met, removal, script

LEASE = "mlchaos-x-0123456789"
LINK = Plan(LEASE, "network_latency", 60.0, peers=("10.96.0.7", "fd00::7"), spare=("10.0.0.1",), latency_s=0.5)
# As a Linux 6.18 kernel sent it: the first packet of queue 38798, NFQNL_COPY_META, a SYN-ACK on its way in.
PACKET = bytes.fromhex(
    "400000000003000000000000000000000200978e0b00010000000001080001000800050000000002100009000006000076f8025bc42c0000"
    "08000e0000000001"
)


def test_messages_are_laid_out_as_the_kernel_wants_them() -> None:
    verdict = queue.message(queue.MSG_VERDICT_BATCH, 7, (queue.NFQA_VERDICT_HDR, bytes.fromhex("0000000100000102")))
    assert verdict.hex() == "2000000003030100" + "00" * 8 + "00000007" + "0c000200" + "00000001" + "00000102"
    odd = queue.message(queue.MSG_CONFIG, 1, (queue.NFQA_CFG_PARAMS, b"\0\0\0\0\1"), flags=5)
    assert len(odd) == 32 and odd[:4] == bytes([32, 0, 0, 0]) and odd[20:22] == b"\x09\0"  # its length is unpadded
    assert queue.attributes(odd) == {queue.NFQA_CFG_PARAMS: b"\0\0\0\0\1"}


def test_packets_and_refusals_are_told_apart() -> None:
    assert queue.packet_id(PACKET) == queue.packet_id_fast(PACKET) == 1
    assert queue.refusal(PACKET) is None
    error = bytes.fromhex("24000000020000000000000000000000") + (-1).to_bytes(4, "little", signed=True)
    assert queue.refusal(error) == 1 and queue.packet_id(error) is None and queue.packet_id_fast(error) is None
    assert queue.packet_id(PACKET[:20]) is None


def test_a_delay_wanders_within_its_bounds_and_keeps_the_order() -> None:
    wander, due, seen = queue.Wander(0.5, 0.1, seed=1), 0.0, list[float]()
    for i in range(40_000):
        t = i * 0.005
        delay = wander.at(t)
        assert 0.4 <= delay <= 0.6 and t + delay > due
        due = t + delay
        seen.append(delay)
    assert abs(statistics.mean(seen) - 0.5) < 0.005 and statistics.stdev(seen) > 0.04
    sparse = [wander.at(1000.0 + i * 3.0) for i in range(2000)]  # each on its own
    assert abs(statistics.mean(sparse) - 0.5) < 0.005 and min(sparse) < 0.41 and max(sparse) > 0.59
    assert queue.Wander(0.5, 0.0).at(1.0) == 0.5


def test_rules_hit_the_link_and_nothing_else() -> None:
    text = script(LINK, 4)
    assert "-A MLCHAOS-0123456789-i -s 10.0.0.1 -j RETURN\n-A MLCHAOS-0123456789-i -s 10.96.0.7 -j" in text
    assert "--rcheck --seconds 5" in text and "fd00::7" not in text and "OUTPUT" not in text
    assert "-s fd00::7" in script(LINK, 6) and "10." not in script(LINK, 6)
    cut = script(Plan(LEASE, "network_partition", 9.0, peers=("10.96.0.7",), ports=(80, 8080)), 4)
    assert "-i -s 10.96.0.7 -p tcp -m multiport --sports 80,8080 -j MLCHAOS-0123456789-a" in cut
    assert "-o -d 10.96.0.7 -p udp -m multiport --dports 80,8080 -j MLCHAOS-0123456789-a" in cut
    everybody = script(Plan(LEASE, "network_isolation", 9.0), 4)
    assert "-A MLCHAOS-0123456789-i -j MLCHAOS-0123456789-a" in everybody and "! -i lo" in everybody
    # A link that has addresses of one IP version only must not become everybody in the other.
    one = script(Plan(LEASE, "network_partition", 9.0, peers=("10.96.0.7",)), 6)
    assert "-A MLCHAOS-0123456789-i -j MLCHAOS-0123456789-a" not in one


def test_what_is_there_is_read_counted_and_taken_away() -> None:
    saved = (
        "*filter\n:INPUT ACCEPT [0:0]\n:MLCHAOS-0123456789-a - [0:0]\n:MLCHAOS-0123456789-i - [0:0]\n:OTHER - [0:0]\n"
        "[9:1] -A INPUT ! -i lo -m comment --comment x -j MLCHAOS-0123456789-i\n[3:1] -A INPUT -j OTHER\n"
        "[7:1] -A MLCHAOS-0123456789-i -s 10.96.0.7/32 -j MLCHAOS-0123456789-a\n"
        "[2:1] -A MLCHAOS-0123456789-a -j DROP\nCOMMIT\n"
    )
    rules = counted(saved, "MLCHAOS-0123456789")
    assert [r.packets for r in rules] == [9, 7, 2] and met(rules, LEASE) == (7, 2)
    plain = "\n".join(line.split("] ", 1)[-1] if line.startswith("[") else line for line in saved.splitlines())
    undo = removal(plain, "MLCHAOS-0123456789").splitlines()
    assert undo == [
        "*filter",
        "-D INPUT ! -i lo -m comment --comment x -j MLCHAOS-0123456789-i",
        "-F MLCHAOS-0123456789-a",
        "-F MLCHAOS-0123456789-i",
        "-X MLCHAOS-0123456789-a",
        "-X MLCHAOS-0123456789-i",
        "COMMIT",
    ]
    assert removal(plain, "MLCHAOS-999") == ""
    assert len(counted("*filter\n:MLCHAOS-0123456789-a - [0:0]\nCOMMIT\n", "MLCHAOS-0123456789")) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "plan: "),
        ('{"lease": "a b", "kind": "network_loss", "duration_s": 1}', "lease: "),
        ('{"lease": "a", "kind": "rain", "duration_s": 1}', "kind: .*Allowed: network_latency"),
        ('{"lease": "a", "kind": "network_loss", "duration_s": 0}', "duration_s: 0"),
        ('{"lease": "a", "kind": "network_loss", "duration_s": 1, "jitter_s": 1}', "jitter_s: 1"),
        ('{"lease": "a", "kind": "network_loss", "duration_s": 1, "peers": ["-j ACCEPT"]}', "-j ACCEPT"),
        ('{"lease": "a", "kind": "network_loss", "duration_s": 1, "ports": [0]}', "ports: "),
        ('{"lease": "a", "kind": "network_loss", "duration_s": 1, "more": 1}', "more"),
    ],
)
def test_a_wrong_plan_is_refused_in_words(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Plan.from_json(text)


def test_a_plan_survives_the_way_into_the_pod() -> None:
    assert Plan.from_json(LINK.to_json()) == LINK and short_name(LEASE) == "0123456789"


def test_the_pod_knows_its_name_servers_and_its_way_out() -> None:
    routes = "Iface\tDestination\tGateway\nlo\t0\neth0\t00000000\t0100F40A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
    assert gateways(routes) == ("10.244.0.1",)
    assert name_servers("search a\nnameserver 10.96.0.10\n#nameserver 1.1.1.1\n") == ("10.96.0.10",)
    dns = at_home(Plan(LEASE, "dns_failure", 9.0, spare=("10.0.0.1",)), "nameserver 10.96.0.10", routes, "")
    assert dns.peers == ("10.96.0.10",) and not dns.spare
    with pytest.raises(ValueError, match="no name server"):
        at_home(Plan(LEASE, "dns_failure", 9.0), "nameserver 127.0.0.1", routes, "")
    alone = at_home(Plan(LEASE, "network_isolation", 9.0, spare=("10.0.0.1",)), "nameserver 10.96.0.10", routes, "")
    assert alone.spare == ("10.0.0.1", "10.244.0.1") and alone.probes == ("dns:10.96.0.10",) and not alone.peers


def test_an_agent_touches_the_kernel_only_when_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for verb in ("install", "remove", "renew"):
        monkeypatch.setattr(network_rules, verb, lambda *_, verb=verb: done.append(verb))
    monkeypatch.setattr(network_rules, "read", lambda *_: [])
    plan = Plan(LEASE, "network_partition", 9.0)
    early = Keeper(plan)
    assert early.answer("status")["phase"] == "starting"
    assert "is starting" in early.answer("go")["error"]
    assert early.answer("stop")["phase"] == "over" and done == []
    assert early.answer("prepare")["phase"] == "over" and "is over" in early.answer("go")["error"] and done == []
    keeper = Keeper(plan)
    assert keeper.answer("prepare")["phase"] == keeper.answer("prepare")["phase"] == "prepared"
    assert done == ["remove", "install"] and keeper.answer("go")["phase"] == "on" and done[-1] == "renew"
    assert keeper.answer("stop")["phase"] == "over" and done[-1] == "remove"

    def fails(*_: object) -> None:
        raise network_rules.RulesError("no such table")

    monkeypatch.setattr(network_rules, "install", fails)
    half = Keeper(plan)
    done.clear()
    said = half.answer("prepare")
    assert said["error"] == "no such table" and said["phase"] == "over" and done == ["remove", "remove"]


PROBE = "tcp:10.96.0.7:80"
WELL = {PROBE: Seen(0.0, True, 0.001)}


def _seen(
    kind: str, before: dict[str, Seen], answered: bool, took_s: float, rules: list[Counted], held: float = 0.0
) -> bool:
    plan = Plan(LEASE, kind, 9.0, probes=(PROBE,), latency_s=0.5, jitter_s=0.1, fraction=0.2)
    return effect(plan, before, {PROBE: Seen(1.0, answered, took_s)}, rules, held)[0]


@pytest.mark.parametrize(("kind", "took_s"), [("network_latency", 0.01), ("network_partition", 0.4)])
def test_one_slow_answer_before_a_delay_does_not_hide_it(
    kind: str, took_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([0.4, 0.01, 0.3])
    monkeypatch.setattr(network_probe, "attempt", lambda probe, limit_s: Seen(0.0, True, next(answers)))
    prober = Prober(Plan(LEASE, kind, 9.0, probes=(PROBE,), latency_s=0.5), lambda: True)
    prober.look_before()
    assert prober.before[PROBE].took_s == took_s


def test_an_effect_is_only_what_was_seen() -> None:
    dropped = [Counted(9, "x -j MLCHAOS-0123456789-a"), Counted(2, "-A MLCHAOS-0123456789-a -j DROP")]
    down = {PROBE: Seen(0.0, False, 1.0)}
    assert _seen("network_latency", WELL, True, 0.42, []) and not _seen("network_latency", WELL, True, 0.3, [])
    assert _seen("network_latency", WELL, False, 0.6, []) and not _seen("network_latency", WELL, False, 0.1, [])
    assert _seen("network_partition", WELL, False, 1.0, []) and not _seen("network_partition", WELL, True, 0.9, dropped)
    # Down before the fault: no connection proves nothing, only what the kernel did does.
    assert not _seen("network_partition", down, False, 1.0, []) and _seen(
        "network_partition", down, False, 1.0, dropped
    )
    assert not _seen("network_latency", down, False, 3.0, []) and _seen(
        "network_latency", down, False, 3.0, dropped, 0.5
    )
    assert _seen("network_loss", WELL, True, 0.001, dropped) and not _seen(
        "network_loss", WELL, False, 3.0, dropped[:1]
    )
