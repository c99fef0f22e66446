"""What every worker of `benchmarks.speed` does: JSON lines in, one JSON line out for each (no JAX, no PyTorch here).

Requests: `{"do": "prepare", "kind": .., "variant": .., ...}` makes a call ready and runs it once; `{"do": "turn",
"variant": ..}` times it; `{"do": "forget"}` drops what was prepared; anything else is a question (`versions`, ...).
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Call = Callable[[], Any]
Prepared = tuple[Call, dict]

LONG_CALL = 0.5
"""Seconds from which on one timed call makes a turn."""


def take_turn(call: Call, wait: Callable[[Any], object], *, pause: float, fill: float) -> list[float]:
    """Seconds of the calls of one turn.

    The pause lets the threads of the library that ran before fall asleep (OpenMP's spin on after a call), the first
    call is not timed because it finds caches and memory in the state that the other library left.
    """
    time.sleep(pause)
    start = time.perf_counter()
    wait(call())
    calls = 1 if time.perf_counter() - start > LONG_CALL else 1000
    seconds: list[float] = []
    while len(seconds) < calls and (not seconds or sum(seconds) < fill):
        start = time.perf_counter()
        wait(call())
        seconds.append(time.perf_counter() - start)
    return seconds


def serve(
    kinds: Mapping[str, Callable[[dict], Prepared]],
    questions: Mapping[str, Callable[[dict], dict]],
    *,
    wait: Callable[[Any], object],
) -> None:
    """Answer until the input ends; what a library cannot do is an answer too ("problem").

    Args:
        kinds: a request -> the call, and facts about it (temporaries, ...).
        questions: a request -> the answer.
        wait: blocks until a call's result is there.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    prepared: dict[str, Call] = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "forget":
                prepared.clear()
                gc.collect()
                answer = {}
            elif request["do"] == "prepare":
                prepared[request["variant"]], answer = _prepare(kinds[request["kind"]], request, wait)
            elif request["do"] == "turn":
                call = prepared[request["variant"]]
                answer = {"seconds": take_turn(call, wait, pause=request["pause"], fill=request["fill"])}
            else:
                answer = questions[request["do"]](request)
        except Exception as error:
            text = str(error).strip()
            answer = {"problem": f"{type(error).__name__}: {text.splitlines()[0][:200] if text else 'no message'}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _prepare(kind: Callable[[dict], Prepared], request: dict, wait: Callable[[Any], object]) -> Prepared:
    start = time.perf_counter()
    call, facts = kind(request)
    compiled = time.perf_counter()
    before = _restart_peak()
    wait(call())
    peak = _status("VmHWM")
    facts = {**facts, "prepare_s": round(compiled - start, 2), "first_call_s": round(time.perf_counter() - compiled, 3)}
    if before is not None and peak is not None:
        facts["peak_growth_mb"] = round(peak - before, 1)
    return call, facts


def _restart_peak() -> float | None:
    """Let Linux forget the largest resident size so far; the size now in MB, None on other systems."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(name: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(name)), None)
