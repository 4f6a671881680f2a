"""Measures what a chat template makes of conversations, as a program of its own that bounds its time and memory.

A chat template is a program, and nothing but a process of its own can bound it. `hf.rendered_length` starts this file
by its path, so it imports nothing of mmtok. The task on standard input is a JSON object:

    module, function   what renders a list of conversations
    arguments          further ones of that function
    conversations      each is rendered alone
    seconds, bytes     of processor time and memory that the template may take

Standard output is the number of characters of the longest prompt. What a template raises is left to the process that
renders it for good. Ends with OUT_OF_MEMORY, or killed by a signal, where a template exceeds its limits.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import Any

OUT_OF_MEMORY = 3  # exit status


def main() -> int:
    task = json.load(sys.stdin)
    render = getattr(import_module(task["module"]), task["function"])
    bound(task["seconds"], task["bytes"])
    longest = 0
    for conversation in task["conversations"]:
        try:
            texts, _ = render([conversation], **task["arguments"])
        except MemoryError:
            return OUT_OF_MEMORY
        except Exception:
            continue
        longest = max(longest, len(texts[0]))
    sys.stdout.write(f"{longest}\n")
    return 0


def bound(seconds: int, memory: int) -> None:
    """Limit what this process may take from now on: seconds of processor time, and bytes of memory."""
    try:
        import resource
    except ImportError:  # on Windows, where only the time of the whole process is bounded
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    limits: list[tuple[Any, int]] = [
        (resource.RLIMIT_AS, used.ru_maxrss * 1024 + memory),
        (resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + seconds),
    ]
    for limit, value in limits:
        _, most = resource.getrlimit(limit)
        resource.setrlimit(limit, (value if most < 0 else min(value, most), most))


if __name__ == "__main__":
    sys.exit(main())
