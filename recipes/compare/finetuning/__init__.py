"""
The comparison of balancing methods in fine-tuning: trained routers, a small learning rate, narrow data, and adapters.

| module | what it is for |
|---|---|
| `command` | what `recipes/compare.py` does with a file that has `bases` |
| `plans`, `run` | what is to be compared, from a YAML file; one run and the key of its result |
| `functions`, `exercises`, `material` | made functions; the tasks; the text of the bases, and everything as tokens |
| `bases` | the models that are fine-tuned: trained once and kept |
| `ways`, `tuning` | what of a model is trained; the loop, and what is measured on the result |
| `grading` | answers, written by the model and scored |
| `tables`, `pictures` | what came of it, in Markdown and drawn |
"""
