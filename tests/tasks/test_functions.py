"""MBPP's rows as functions to be completed, the form of HumanEval."""

import ast
import json
import subprocess
import sys

import pytest
from paths import DATA
from task_rows import MBPP, needs_data

from hf_phibalance.tasks import TASKS, load_rows


def test_mbpp_is_put_as_humaneval_puts_it():
    task = TASKS["mbpp"]
    assert task.prompt(MBPP) == (
        "import math\nBASE = 0\n\ndef helper(x):\n    return x\n\n\n"
        'def largest(a, b=2):\n    """ Write a function to find the "largest" of \\\\two numbers.\n'
        '    >>> largest(1, 5)\n    5\n    """\n'
    )
    assert task.completion(MBPP) == "    if a > b:\n        return helper(a)\n    return b\n"
    docstring = ast.get_docstring(ast.parse(task.prompt(MBPP)).body[-1])
    assert docstring.splitlines()[0] == MBPP["text"]


@pytest.mark.parametrize(
    ("test", "example"),
    [
        ("assert not f(1)", ">>> not f(1)\n    True"),
        ("assert set(f('\"\"\"')) == {'a'}", ">>> set(f('\\\"\"\"'))\n    {'a'}"),
        ("assert math.isclose(f(1), 2.0)", ">>> math.isclose(f(1), 2.0)\n    True"),
    ],
)
def test_other_asserts_become_examples(test, example):
    row = MBPP | {"code": "@cache\ndef f(x):\n    def g():\n        return x\n    return g", "test_list": [test]}
    prompt, completion = TASKS["mbpp"].prompt(row), TASKS["mbpp"].completion(row)
    assert prompt.startswith('@cache\ndef f(x):\n    """ Write') and example in prompt
    assert completion == "    def g():\n        return x\n    return g\n"
    assert ast.get_docstring(ast.parse(prompt + completion).body[0]) is not None


@needs_data
def test_mbpp_still_passes_its_tests():
    rows = load_rows("mbpp", str(DATA / "mbpp"), "all")
    assert len(rows) == 974
    programs = []
    for row in rows[::9]:
        code = TASKS["mbpp"].prompt(row) + TASKS["mbpp"].completion(row)
        programs.append("\n".join([code, row["test_setup_code"], *row["test_list"]]))
    # the data set's own programs, in another process only because they may leave anything behind
    runner = "import json, sys\nfor program in json.load(sys.stdin): exec(program, {'__name__': 'row'})\nprint('done')"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", runner],
        input=json.dumps(programs),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.endswith("done\n"), done.stderr
