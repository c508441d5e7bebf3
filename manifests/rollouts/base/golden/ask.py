"""Ask the canary for the golden predictions: `ask.py URL HASH`. Exit status 0: all as agreed; 1: not, or nobody answered."""

import json
import sys
import time
import urllib.request
from pathlib import Path

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())
ANSWERS_WITHIN_S = 15.0


def ask(url: str, row: list[float], wanted: str, until: float) -> float:
    """One prediction, of a replica of the version that is meant; while another answers, or none, again."""
    while True:
        try:
            request = urllib.request.Request(url, json.dumps({"features": row}).encode())
            with urllib.request.urlopen(request, timeout=2) as response:
                answer = json.load(response)
            if f"-{wanted}-" in answer["replica"]:
                return float(answer["score"])
            said = f"answered by {answer['replica']}, which is not of {wanted}"
        except (OSError, ValueError, KeyError) as error:
            said = repr(error)
        if time.monotonic() > until:
            sys.exit(f"no prediction of the canary: {said}")
        time.sleep(0.2)


def main(url: str, wanted: str) -> None:
    """Compare all; the first that is off ends it."""
    until = time.monotonic() + ANSWERS_WITHIN_S
    for row, agreed in zip(GOLDEN["rows"], GOLDEN["scores"], strict=True):
        score = ask(url, row, wanted, until)
        if not abs(score - agreed) <= GOLDEN["tolerance"]:
            sys.exit(f"the canary says {score:.4f}, agreed is {agreed:.4f} ± {GOLDEN['tolerance']:g}")
    print(f"{len(GOLDEN['rows'])} golden predictions as agreed")


if __name__ == "__main__":
    main(*sys.argv[1:])
