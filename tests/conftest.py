"""Shared by all test files: one thread per process, and what was warned about."""

import logging
import os


# Tests run beside each other, and start processes of their own: their threads would wait for each other, not work.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported

import pytest
import transformers


# Assertions in helpers say what was unequal, as those in tests do.
pytest.register_assert_rewrite("adapters", "charging", "checks", "steps", "training")


def pytest_configure(config):
    """With `-n`, the tests of a group go to one worker, which sets up what they share once."""
    config.addinivalue_line("markers", "xdist_group(name): to be run by the same worker")
    if hasattr(config, "workerinput"):
        config.option.loadgroup = True  # as `--dist loadgroup`, which pytest without xdist would not know
    elif getattr(config.option, "dist", "no") == "load":
        config.option.dist = "loadgroup"


class Messages(logging.Handler):
    """Collects what transformers and this package log at warning level or above."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())

    def about(self, text):
        return [line for line in self.lines if text in line]


@pytest.fixture
def warned():
    """The warnings of this test, `warning_once` included even if an earlier test has seen the same one."""
    logging.Logger.warning_once.cache_clear()
    messages = Messages()
    loggers = [logging.getLogger(name) for name in (transformers.__name__, "hf_phibalance")]
    for logger in loggers:
        logger.addHandler(messages)
    yield messages
    for logger in loggers:
        logger.removeHandler(messages)
