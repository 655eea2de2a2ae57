"""A run of the comparison of methods that takes a second."""


def small_run(house, **fields):
    fields = {"model": "mixtral", "stream": "mixed", "seed": 0, "method": {"method": "none"}, "steps": 8} | fields
    sizes = {
        "hidden_size": 32,
        "head_dim": 16,
        "num_hidden_layers": 2,
        "intermediate_size": 16,
        "num_local_experts": 8,
    }
    return house["run"].Run(**{"rows": 6, "window": 16, "model_fields": sizes, "corpus": "x"} | fields)
