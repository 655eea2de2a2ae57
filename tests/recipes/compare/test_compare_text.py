"""The text of the comparison: documents held out as a whole, their windows, and the batches of a stream."""

from collections import Counter

import pytest
import torch
from paths import DATA


def test_documents_are_held_out_as_a_whole(house, documents):
    split = house["documents"].split_documents
    for texts in documents.values():
        train, held_out = split([*texts, *texts[:30]])  # duplicates must not end up in both parts
        assert not set(train) & set(held_out)
        assert sorted([*train, *held_out]) == sorted(set(texts))
        assert 0.1 <= sum(map(len, held_out)) / sum(map(len, texts)) <= 0.12
    # a document keeps its place in the order whatever else is there
    fewer = split(documents["prose"][:60], held_out=0.5)
    more = split(documents["prose"], held_out=0.5)
    order = [text for part in (more[1], more[0]) for text in part if text in documents["prose"][:60]]
    assert order == [*fewer[1], *fewer[0]]
    assert len(split(documents["prose"], most_characters=2000)[0]) < 10
    with pytest.raises(ValueError, match="needs at least 2"):
        split(["one", "one"])


def test_windows_hold_the_documents_in_order(house, corpus, documents):
    train, _ = house["documents"].split_documents(documents["prose"])
    tokenizer = house["corpus"].train_tokenizer([documents["prose"]], 300)
    windows = house["corpus"].windows(tokenizer, train, 16)
    ids = [i for text in train for i in [*tokenizer.encode(text).ids, tokenizer.token_to_id("<|endoftext|>")]]
    assert windows.flatten().tolist() == ids[: len(ids) // 16 * 16]
    parts = tokenizer.decode(windows.flatten().tolist(), skip_special_tokens=False).split("<|endoftext|>")
    assert parts[:-1] == train[: len(parts) - 1]
    assert set(corpus.train) == set(corpus.validation) == set(documents)
    assert all(rows.shape == (12, 16) for rows in corpus.validation.values())


def test_no_held_out_text_is_trained_on(corpus):
    """Every 16 tokens of the made-up documents say which document they are from."""
    for domain in corpus.train:
        seen = {tuple(row) for row in corpus.train[domain].tolist()}
        assert not seen & {tuple(row) for row in corpus.validation[domain].tolist()}


def test_corpus_is_cached_and_told_apart(house, documents, tmp_path, monkeypatch):
    text = house["corpus"]
    monkeypatch.setattr(text, "read_documents", lambda source: documents)
    first = text.build_corpus("made up", 16, 300, 12, tmp_path)
    monkeypatch.setattr(text, "train_tokenizer", None)  # must not be needed again
    again = text.build_corpus("made up", 16, 300, 12, tmp_path)
    loaded = text.load_corpus(first.fingerprint, tmp_path)
    for other in (again, loaded):
        assert other.fingerprint == first.fingerprint
        assert all(torch.equal(other.train[domain], first.train[domain]) for domain in first.train)
    with pytest.raises(TypeError):
        text.build_corpus("made up", 8, 300, 12, tmp_path)


def test_missing_data_names_the_remedy(house, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gsm8k/train\.jsonl.*built-in"):
        house["documents"].read_documents(tmp_path)


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data is not there")
def test_real_articles(house):
    texts = house["documents"].read_documents(DATA)
    assert len(texts["problems"]) == 7473
    articles = texts["prose"]
    assert 50 <= len(articles) <= 70  # 60 articles in the validation part of WikiText-2
    assert articles[0].startswith("= Homarus gammarus =")
    assert all(text.splitlines()[0].count("=") == 2 for text in articles)
    assert "\n = = " in articles[0] or "= = " in articles[0]  # its sections stay in it


# ---------------------------------------------------------------------- streams


def test_schedules(house):
    streams = house["streams"]
    for rows in (6, 9, 10):
        mixed = streams.schedule("mixed", 30, rows)
        assert all(sum(counts) == rows and min(counts) >= rows // 3 for counts in mixed)
        assert [sum(column) for column in zip(*mixed)] == [10 * rows] * 3
        blocked = streams.schedule("blocked", 30, rows)
        assert [max(counts) for counts in blocked] == [rows] * 30
        assert [counts.index(rows) for counts in blocked] == [0, 1, 2] * 10
    shift = streams.schedule("shift", 20, 9)
    assert shift == [(4, 4, 1)] * 10 + [(1, 1, 7)] * 10
    with pytest.raises(ValueError, match="mixed"):
        streams.schedule("other", 1, 9)
    with pytest.raises(ValueError, match="rows"):
        streams.schedule("mixed", 1, 2)


def test_batches_follow_the_schedule_and_the_seed(house, corpus):
    streams = house["streams"]
    home = {tuple(row): domain for domain, rows in corpus.train.items() for row in rows.tolist()}
    for stream in streams.STREAMS:
        batches = list(streams.batches(corpus, stream, 12, 9, seed=3))
        for ids, counts in zip(batches, streams.schedule(stream, 12, 9)):
            found = Counter(home[tuple(row)] for row in ids.tolist())
            assert [found[domain] for domain in streams.DOMAINS] == list(counts)
        again = list(streams.batches(corpus, stream, 12, 9, seed=3))
        other = list(streams.batches(corpus, stream, 12, 9, seed=4))
        assert all(map(torch.equal, batches, again))
        assert not any(map(torch.equal, batches, other))
    # every window once before any comes again
    count = len(corpus.train["prose"])
    rows = [tuple(row) for ids in streams.batches(corpus, "blocked", 3 * 2 * count, 1, 0) for row in ids.tolist()]
    prose = [row for row in rows if home[row] == "prose"]
    every = Counter(map(tuple, corpus.train["prose"].tolist()))
    assert Counter(prose[:count]) == Counter(prose[count:]) == every
    assert prose[:count] != prose[count:]
