"""The record of who was allowed what: a Merkle log in the C2SP tlog-tiles layout, with signed checkpoints. docs/audit.md

entries    what an entry says: allow-listed fields, one JSON object each
tiles      the names and bytes of tiles and entry bundles
edge       the part of the tree that still grows, in memory
journal    the one file that a group commit appends to and syncs
store      the log on disk, written: recovery, commits, publication
log        what the gateway calls: one thread that groups, commits and answers
reader     the log on disk, read, also while it is written
check      whether it holds, and if not, the first place where it does not
index      the entries as a table, for questions
"""
