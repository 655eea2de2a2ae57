"""Shared by all test files: one thread per process, and what was warned about."""

import gc
import logging
import os


# Tests run beside each other, and start processes of their own: their threads would wait for each other, not work.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported

import pytest
import transformers


# Assertions in helpers say what was unequal, as those in tests do.
pytest.register_assert_rewrite("adapters", "charging", "checks", "measuring", "steps", "training")


# Files whose tests share what takes long to set up, such as processes: each goes to one worker.
TOGETHER = (
    "tests/balancing/test_invariance.py",
    "tests/balancing/test_numbers_on_ranks.py",
    "tests/hub/test_card.py",
    "tests/recipes/test_recipe_sft.py",
    "tests/training/test_launch.py",
    "tests/training/test_layouts.py",
    "tests/training/test_trackers.py",
)


def pytest_ignore_collect(collection_path, config):
    """With `-m "not slow"`, a file that is slow as a whole is not even imported."""
    if config.option.markexpr == "not slow" and collection_path.suffix == ".py":
        return "\npytestmark = pytest.mark.slow" in collection_path.read_text(encoding="utf-8") or None
    return None


def pytest_collection_finish(session):
    """Makes the garbage collector pass over what was imported. Each Trainer collects twice, which took it a second each time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `-n`: those first, all else test by test."""
    if config.getvalue("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            return file if file in TOGETHER else nodeid

    return Scheduling(config, log)


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
