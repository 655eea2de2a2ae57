"""
The comparison of balancing methods. Command: `recipes/compare.py`. Results: README.md and FINETUNING.md.

| module | what it is for |
|---|---|
| `harness` | turns a YAML file of plans into runs; one process and one JSON line each |
| `scratch`, `finetune` | the two kinds of runs |
| `text`, `exercises`, `models` | training data, and the models |
| `training`, `measures` | optimizer steps; figures |
| `tables`, `pictures` | Markdown and PNG of the results file |
"""
