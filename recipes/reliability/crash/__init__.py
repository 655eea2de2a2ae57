"""
Kills training runs and resumes them: do they end as the run that nobody touched, bit for bit?

A tiny Mixtral with dropout, both levers on, six steps of two micro-batches, a checkpoint every second step of which the
last is kept (`save_total_limit=1`). A run is killed up to three times, resumed from the newest complete checkpoint each
time, and then left to its end. The moments:

    forward, backward   in a module, for a parameter, of a step drawn at random
    update              the optimizer has stepped, the duals have not
    checkpoint          at a random time after the writing of a checkpoint began; rotation is within
    state               at a random time after the writing of the duals' file began
    any                 at a random time after the process was started, resuming included
    disk                no kill: the disk is full after a random number of bytes, and the run dies of that

By SIGKILL; of two ranks one is killed, the other at most 20 ms later. After each kill the newest complete checkpoint has
to hold what the untouched run wrote at that step (weights, optimizer, schedule, random states, duals), and be no older than
the one before; what `transformers` would have resumed from is counted. In the end weights, optimizer, duals, prices and
random states have to be those of the untouched run.

| module | what it is for |
|---|---|
| `training` | the run, in a process of its own |
| `traps` | how it is to die |
| `runs` | starting it, killing it; the one that nobody kills |
| `killing` | again and again, and what is left each time |
| `checks` | whether two things that runs left are the same |
| `disk` | a disk that gets full |
| `command` | the command line |
"""

from .command import main


__all__ = ["main"]
