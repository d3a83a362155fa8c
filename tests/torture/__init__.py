"""Fault injection: real processes killed, real disks filled, real bits flipped; figures instead of promises.

    python -m tests.torture [--only kill,strace] [--scale 0.05] [--json FILE] [--seed N]

A module per fault, with one function `torture(trial)`; docs/reliability.md says what each one promises.
Everything that trains or saves runs in a child of its own: this process imports torch and hldm once, starts no
thread and runs nothing in parallel, so that a fork of it is safe and costs milliseconds, not the seconds of
an import.
"""
