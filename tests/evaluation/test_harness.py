"""Our models and tasks in lm-evaluation-harness: its prompts, completions and scores, and expert load."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from evaluated import FIELDS, biased_mixtral, completed_functions, llama_like, recorded
from task_rows import write

import hf_phibalance as phb
from hf_phibalance.tasks import make_splits


lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402

from hf_phibalance.evaluation.harness import PhiBalanceLM, load_task, model_fingerprint  # noqa: E402
from hf_phibalance.files import STATE_NAME  # noqa: E402


pytestmark = pytest.mark.slow


def harness_task(name, **fields):
    """A task of the harness with problems from files."""
    return load_yaml(Path(lm_eval.__file__).parent / "tasks" / name / f"{name}.yaml") | {"dataset_name": None} | fields


def evaluate(task, answers, **options):
    """`(prompts, metrics)` of a task whose problems are answered by `answers`."""
    lm = recorded(answers)
    manager = TaskManager(include_defaults=False)
    found = lm_eval.simple_evaluate(lm, tasks=[task], task_manager=manager, bootstrap_iters=0, **options)
    (metrics,) = found["results"].values()
    return lm.prompts, {name: value for name, value in metrics.items() if isinstance(value, float)}


def asked(prompts):
    """Prompts with their stop texts and limits."""
    return [(text, set(options["until"]), options.get("max_gen_toks")) for text, options in prompts]


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory):
    """A folder with problems in the form of GSM8K."""
    folder = tmp_path_factory.mktemp("gsm8k")
    splits = make_splits(50, 0, 12, seed=3)
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in splits[split]))
    return folder


def test_gsm8k_is_that_of_the_harness(gsm8k):
    rows = [json.loads(line) for line in (gsm8k / "test.jsonl").read_text().splitlines()]
    numbers = [row["answer"].split("#### ")[1] for row in rows]
    answers = [f" So it is {number}.\n#### {number}" for number in numbers[:4]] + [f" {n}" for n in numbers[4:8]]
    answers += [" #### 1.", " none", "#### $5", ""]
    theirs, expected = evaluate(harness_task("gsm8k", dataset_path=str(gsm8k)), answers)
    ours, found = evaluate(load_task("gsm8k", str(gsm8k)), answers)
    assert asked(ours) == asked(theirs)
    assert ours[0][0].count("Question:") == 6
    assert found["strict_match,none"] == expected["exact_match,strict-match"] == 4 / 12
    assert found["flexible_extract,none"] == expected["exact_match,flexible-extract"] == 8 / 12


def test_humaneval_is_that_of_the_harness(tmp_path, monkeypatch):
    problems, answers = completed_functions()
    answers[1] = "    return 0\n"
    (tmp_path / "HumanEval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))

    class CodeEval:
        """Stands for `code_eval`, which the harness would load from the Hub."""

        def compute(self, references, predictions, k):
            try:
                exec(f"{predictions[0][0]}\n{references[0]}", {})
                return {"pass@1": 1.0}, None
            except Exception:
                return {"pass@1": 0.0}, None

    monkeypatch.setattr("evaluate.load", lambda *args, **kwargs: CodeEval())
    files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "HumanEval.jsonl")}}}
    allowed = {"confirm_run_unsafe_code": True}
    theirs, expected = evaluate(harness_task("humaneval", **files), answers, **allowed)
    ours, found = evaluate(load_task("humaneval", str(tmp_path / "HumanEval.jsonl")), answers, **allowed)
    assert asked(ours) == asked(theirs)
    assert found["pass@1,none"] == expected["pass@1,create_test"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="confirm_run_unsafe_code"):
        evaluate(load_task("humaneval", str(tmp_path / "HumanEval.jsonl")), answers)


def test_shots_need_training_rows(gsm8k):
    with pytest.raises(ValueError, match=r"is one file, which has no training rows.*num_fewshot=0"):
        load_task("gsm8k", str(gsm8k / "test.jsonl"))
    prompts, _ = evaluate(load_task("gsm8k", str(gsm8k / "test.jsonl"), num_fewshot=0), ["1"])
    assert len(prompts) == 12 and prompts[0][0].count("Question:") == 1


@pytest.mark.parametrize("end", ["", ".gz"])
def test_a_folder_s_socratic_answers_are_not_read(gsm8k, tmp_path, end):
    """In the folder that OpenAI publishes they lie beside the others."""
    for split in ("train", "test"):
        text = (gsm8k / f"{split}.jsonl").read_bytes()
        (tmp_path / f"{split}.jsonl{end}").write_bytes(gzip.compress(text) if end else text)
        (tmp_path / f"{split}_socratic.jsonl").write_bytes(text.replace(b'"answer": "', b'"answer": "Socratic '))
    expected, _ = evaluate(load_task("gsm8k", str(gsm8k)), ["1"])
    found, _ = evaluate(load_task("gsm8k", str(tmp_path)), ["1"])
    assert asked(found) == asked(expected) and len(found) == 12 and "Socratic" not in str(found)
    (tmp_path / f"train.jsonl{end}").unlink()
    with pytest.raises(ValueError, match=r"holds no train\.jsonl to draw shots from\. Add it, or give num_fewshot=0"):
        load_task("gsm8k", str(tmp_path))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"answer": "The answer is 18."},
            r"its answer has no '#### <number>' \(answer='The answer is 18\.'\)\. Correct",
        ),
        ({"question": None}, r"Row 2 of the test problems .* its question is NoneType, not str"),
    ],
)
def test_problems_that_cannot_be_asked_or_scored(tmp_path, row, message):
    rows = make_splits(0, 0, 2)["test"]
    write(tmp_path / "test.jsonl", [rows[0], rows[1] | row])
    with pytest.raises(ValueError, match=message):
        evaluate(load_task("gsm8k", str(tmp_path / "test.jsonl"), num_fewshot=0), ["#### 18"])


def test_problems_without_a_question_and_empty_files(tmp_path):
    write(tmp_path / "test.jsonl", [{"answer": "#### 18"}])
    with pytest.raises(ValueError, match=r"Row 1 of the test problems .* it has no question"):
        evaluate(load_task("gsm8k", str(tmp_path / "test.jsonl"), num_fewshot=0), ["#### 18"])
    write(tmp_path / "test.jsonl", [])
    with pytest.raises(ValueError, match=r"test\.jsonl is empty\. Get the file anew"):
        load_task("gsm8k", str(tmp_path / "test.jsonl"), num_fewshot=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random Mixtral with a selection bias in its state."""
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = biased_mixtral()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


PROMPTS = [f"Question: {row['question']}\nAnswer:" for row in make_splits(0, 0, 10)["test"]]
STOPS = ["th", "o", "\n"]


def completions(lm, prompts=PROMPTS, stops=STOPS):
    options = {"until": stops, "max_gen_toks": 20, "do_sample": False}
    return lm.generate_until([Instance("generate_until", {}, (text, dict(options)), 0) for text in prompts], True)


def test_completions_are_those_of_the_harness_with_the_bias(folder):
    model = phb.AutoModelForCausalLM.from_pretrained(folder)
    expected = completions(HFLM(pretrained=model, tokenizer=PhiBalanceLM(str(folder)).tokenizer, batch_size=3))
    found = completions(PhiBalanceLM(str(folder), batch_size=3))
    assert found == expected and len(set(found)) > 1
    plain = phb.AutoModelForCausalLM.from_pretrained(folder, phi_balance=False)
    assert found != completions(HFLM(pretrained=plain, tokenizer=PhiBalanceLM(str(folder)).tokenizer, batch_size=3))


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 4, 10])
def test_load_of_a_generation(folder, batch_size):
    """Prompts and new tokens once, whatever the batch size; by a forward of each text alone."""
    lm = PhiBalanceLM(str(folder), batch_size=batch_size)
    generated = []
    generate = lm.model.generate

    def generate_and_keep(**options):
        generated.append((options["attention_mask"], generate(**options)))
        return generated[-1][1]

    lm.model.generate = generate_and_keep
    balancer = phb.get_balancer(lm.model)
    before = {name: value.clone() for name, value in balancer.state_dict().items()}
    with lm.counting_load():
        texts = completions(lm)
        load = lm.expert_load()
    assert load["completions"] == len(texts) == 10
    assert balancer.forwards.evaluation is None  # nothing is left of counting
    assert all(torch.equal(value, before[name]) for name, value in balancer.state_dict().items())

    tokens, counts, lengths = 0, torch.zeros(2, 4), set()
    gates = [module for name, module in lm.model.named_modules() if name.endswith("mlp.gate")]
    chosen = {}
    for layer, gate in enumerate(gates):
        gate.register_forward_hook(lambda _, __, output, layer=layer: chosen.__setitem__(layer, output[2]))
    for mask, rows in generated:
        for row, own in zip(rows, mask):
            prompt, new = row[: len(own)][own == 1], row[len(own) :].tolist()
            # up to the token that ends the row, of which nothing is computed
            texts = [lm.tokenizer.decode(new[:n]) for n in range(1, len(new) + 1)]
            ends = [n for n, text in enumerate(texts, start=1) if any(stop in text for stop in [*STOPS, "</s>"])]
            length = min(ends, default=len(new))
            ids = torch.cat([prompt, torch.tensor(new[: length - 1], dtype=torch.long)])
            lm.model(input_ids=ids[None], use_cache=False)
            tokens += len(ids)
            lengths.add(length)
            for layer in range(2):
                counts[layer] += torch.bincount(chosen[layer].flatten(), minlength=4)
    assert load["tokens"] == tokens and len(lengths) > 3  # rows of one batch end at different times
    expected = (counts / counts.mean(1, keepdim=True)).max(1).values - 1
    assert load["max_vio"] == pytest.approx(expected.mean().item(), abs=1e-5)


def test_an_adapter_with_its_bias(folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = phb.AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    balancer = phb.get_balancer(model)
    balancer.set_biases({name: torch.tensor([0.0, 0.5, -0.5, 0.0]) for name in balancer.layer_names})
    adapted.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists() and (tmp_path / STATE_NAME).exists()
    lm = PhiBalanceLM(str(tmp_path))
    expected = completions(HFLM(pretrained=adapted.eval(), tokenizer=lm.tokenizer))
    assert completions(lm) == expected != completions(PhiBalanceLM(str(folder)))


def test_the_first_space_of_a_program_is_kept(folder, tmp_path):
    """Of tokenizers like Llama's, which drop it when they decode a completion alone."""
    tokenizer = llama_like()
    model = phb.AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lm = PhiBalanceLM(str(tmp_path))
    prompt, body = "def f(a):\n", "    return a\n"
    both = tokenizer(prompt + body)["input_ids"]
    own = both[len(tokenizer(prompt)["input_ids"]) :]
    assert tokenizer.decode(own) == body[1:] and lm.tok_decode(own) == body
    assert lm.tok_decode(tokenizer.eos_token_id, skip_special_tokens=False) == "</s>"
    assert lm.tok_decode([*own, tokenizer.eos_token_id]) == body


def test_dense_models_have_no_load(folder, tmp_path):
    from hf_phibalance.models import build_model

    tokenizer = PhiBalanceLM(str(folder)).tokenizer
    fields = {key: value for key, value in FIELDS.items() if "experts" not in key}
    build_model("llama", fields, tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lm = PhiBalanceLM(str(tmp_path), batch_size=4)
    with lm.counting_load():
        assert len(completions(lm)) == 10 and lm.expert_load() is None


def test_another_bias_or_another_setting_makes_another_model(tmp_path):
    """So that the cached completions of one are not taken for the other's."""
    found = set()
    for content in ("one", "another"):
        (tmp_path / STATE_NAME).write_text(content)
        found.add(model_fingerprint(str(tmp_path)))
    found |= {model_fingerprint(str(tmp_path), dtype=dtype) for dtype in ("float32", "bfloat16")}
    assert len(found) == 4


def test_another_base_of_an_adapter_makes_another_model(tmp_path):
    adapter = tmp_path / "adapter"
    write(adapter / "adapter_config.json", [{"base_model_name_or_path": str(tmp_path / "base")}])
    found = set()
    for content in ("one", "another"):
        write(tmp_path / "base" / "model.safetensors", [content])
        found |= {model_fingerprint(str(adapter)), model_fingerprint(str(adapter))}
    assert len(found) == 2


@pytest.mark.parametrize("config", ["config.json", "adapter_config.json"])
def test_another_commit_on_the_hub_makes_another_model(tmp_path, config):
    cached = tmp_path / "models--me--tiny"
    found = set()
    for commit in ("1" * 40, "2" * 40):
        write(cached / "snapshots" / commit / config, [{"base_model_name_or_path": str(tmp_path)}])
        (cached / "refs").mkdir(exist_ok=True)
        (cached / "refs" / "main").write_text(commit)
        found.add(model_fingerprint("me/tiny", cache_dir=str(tmp_path), local_files_only=True))
    assert len(found) == 2
