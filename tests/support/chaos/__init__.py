"""The chaos harness: real runs under faults, in which every row that the learner draws says where it comes from.

`rows` is what an observation says of itself and how a drawn row is checked; `hook` and `plants` are what the processes
of a run meet when they start; `board` is what they tell the harness; `launch` is one launch and what it must leave
behind; `faults` injects; `harness` draws faults until there were enough; `soak` wears out the replay ring alone.
"""
