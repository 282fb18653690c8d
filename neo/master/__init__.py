"""The master node: orders transactions, owns the partition table, elects the primary.

`app.Master` holds what lasts longer than a phase; a phase (`phase.py`: election,
recovery, verification, running) owns its handlers and data, and leaving drops them.
Decisions are pure functions in `policy.py` (partition table) and `tid.py` (ids).
"""
