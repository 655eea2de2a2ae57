"""
The comparison of balancing methods. `recipes/compare.py` is its command, README.md and FINETUNING.md are what it found.

| module | what it is for |
|---|---|
| `harness` | a YAML file of plans becomes runs; one process and one JSON line each |
| `scratch`, `finetune` | the two kinds of runs |
| `text`, `exercises`, `models` | what is trained on, and what is trained |
| `training`, `measures` | optimizer steps; figures |
| `tables`, `pictures` | Markdown and PNG of the results file |
"""
