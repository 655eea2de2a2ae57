"""A valid row of each task, and files of rows."""

import json

import pytest
from paths import DATA


needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the real data sets")
GSM8K = {"question": "Mia has 2 pens and buys 3. How many has she?", "answer": "2+3=<<2+3=5>>5\n#### 5"}
MBPP = {
    "task_id": 601,
    "text": 'Write a function to find the "largest" of \\two numbers.',
    "code": "import math\r\nBASE = 0\r\ndef helper(x):\r\n\treturn x # no change\r\n"
    'def largest(a, b=2):\r\n  """Old words."""\r\n  if a > b:\r\n    return(helper(a))\r\n  return b',
    "test_list": ["assert largest(1, 5) == 5", "assert largest(7) == 7"],
}
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def one():\n    """ Return 1 """\n',
    "entry_point": "one",
    "canonical_solution": "    return 1\n",
    "test": "def check(candidate):\n    assert candidate() == 1\n",
}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)
