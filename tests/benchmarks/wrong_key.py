"""The time of a look-up, and how much of a wrong key it betrays: `python -m tests.benchmarks.wrong_key`.

Wrong keys that share the form (sk-tts-), half, or all but the last character with a known one are looked up in turns,
among 10,000 keys.
"""

import random
import statistics
import time
from typing import Final

from server.http.keys import Caller, Keyring, digest_of, new_key
from tests.benchmarks import machine

ROUNDS: Final = 2_000
EACH: Final = 100


def main() -> None:
    """Measure, and print the table."""
    keys = [new_key() for _ in range(10_000)]
    keyring = Keyring({digest_of(key): Caller(client="key:a") for key in keys}, guards_speech=True)
    print("\n".join(f"- {line}" for line in machine.describe()))
    print(f"- {ROUNDS} rounds of {EACH} look-ups each, a new known key in each round")
    times = measure(keyring, keys)
    print("\n| right characters | ns, p10 | ns, p50 |\n|---|---|---|")
    for name, found in times.items():
        deciles = statistics.quantiles(found, n=10)
        print(f"| {name} | {deciles[0]:.0f} | {deciles[4]:.0f} |")


def measure(keyring: Keyring, keys: list[str]) -> dict[str, list[float]]:
    """Nanoseconds of a look-up by how much of the key is right."""
    times: dict[str, list[float]] = {"those of the form": [], "half": [], "all but the last": []}
    for _ in range(ROUNDS):
        known = random.choice(keys)  # noqa: S311 -- not a secret
        other, half = new_key(), len(known) // 2
        last = "x" if known[-1] != "x" else "y"
        wrong = {"those of the form": other, "half": known[:half] + other[half:], "all but the last": known[:-1] + last}
        for name, key in random.sample(list(wrong.items()), len(wrong)):
            began = time.perf_counter_ns()
            for _ in range(EACH):
                assert keyring.find(key) is None
            times[name].append((time.perf_counter_ns() - began) / EACH)
    return times


if __name__ == "__main__":
    main()
