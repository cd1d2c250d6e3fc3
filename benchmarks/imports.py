"""What the imports of a worker of a fit take, and what they would with ``scipy.stats``, which FrEIA imports by itself.

``python benchmarks/imports.py`` runs both in turns, each in a process of its own, and prints medians and their ratio.
"""

import subprocess
import sys
from statistics import median

ROUNDS = 5
WORKER = "import sprue.training.worker, sprue.training.loop"
PRINT = """
import resource
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)
"""


def measure(code: str) -> tuple[float, float]:
    """Seconds of CPU, and MiB of memory."""
    done = subprocess.run([sys.executable, "-c", f"{code}\n{PRINT}"], check=True, capture_output=True, text=True)
    seconds, memory = map(float, done.stdout.split())
    return seconds, memory


def main() -> None:
    """Measures and prints."""
    codes = {"as it is": WORKER, "with scipy.stats": f"import scipy.stats\n{WORKER}"}
    measure(codes["with scipy.stats"])  # from the disk
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in codes}
    for _ in range(ROUNDS):
        for name, code in codes.items():
            found[name].append(measure(code))
    seconds = {name: median(each[0] for each in rows) for name, rows in found.items()}
    memory = {name: median(each[1] for each in rows) for name, rows in found.items()}
    for name in codes:
        print(f"{name:18} {seconds[name]:.2f} s of CPU, {memory[name]:.0f} MiB")
    print(f"ratio {seconds['as it is'] / seconds['with scipy.stats']:.2f}")


if __name__ == "__main__":
    main()
