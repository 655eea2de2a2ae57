"""
The comparison of balancing methods; `recipes/compare.py` is its command, README.md beside this file what it found.

| module | what it is for |
|---|---|
| `command`, `workers` | the command line; training many runs side by side |
| `plans`, `run` | what is to be compared, from a YAML file; one run and the key of its result |
| `documents`, `corpus`, `streams` | the text, its tokens, the batches |
| `models`, `loop`, `measures` | what is trained, how, and what is measured on it |
| `clock` | how long a step takes, on a CPU and on a GPU |
| `portable` | what is left where a model is served without its selection bias |
| `records`, `finished` | the results file; what there is of a plan |
| `paired`, `tables`, `plots` | statistics over seeds, Markdown, pictures |
| `finetuning` | the same for fine-tuning, a package of its own |
"""
