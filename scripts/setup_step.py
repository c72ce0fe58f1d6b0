"""One step of the Makefile's set-up: says what it does, and every 25 seconds that it still does.

    python scripts/setup_step.py "1 of 4: an environment" COMMAND ...

Runs before anything is installed: standard library only. Exit code: the command's.
"""

import subprocess
import sys
import time

SECONDS_BETWEEN_LINES = 25.0


def main(name: str, command: list[str]) -> int:
    print(name, flush=True)
    begin = time.monotonic()
    process = subprocess.Popen(command)
    try:
        while True:
            try:
                return process.wait(SECONDS_BETWEEN_LINES)
            except subprocess.TimeoutExpired:
                minutes, seconds = divmod(round(time.monotonic() - begin), 60)
                print(f"{name}: {minutes}:{seconds:02} so far", flush=True)
    except KeyboardInterrupt:
        process.wait()
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
