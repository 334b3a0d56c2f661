"""Pretrained models and texts from local files; the models here are tiny and random."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fedpriv.cli import main
from fedpriv.data.text.tokens import Texts
from fedpriv.errors import UserError
from fedpriv.experiment.config import load_config
from fedpriv.experiment.run import run_experiment
from fedpriv.tasks.adapters import Head, Lora, lora_layers, merged
from fedpriv.tasks.adapters.pretrained import ImageBody, TextEncoder
from fedpriv.trained.inputs import read_examples, read_inputs
from fedpriv.trained.module import load_trained

WORDS = ["[PAD]", "[UNK]", "a", "good", "bad", "film", "very"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_texts_are_cut_and_padded(tokenizer: Path) -> None:
    (tokenizer / "train.tsv").write_text('sentence\tlabel\na "good film\t1\nbad\t0\nvery very very very bad film\t0\n')
    (tokenizer / "dev.tsv").write_text("sentence\tlabel\nna\t1\n")
    texts = Texts(file="train.tsv", test_file="dev.tsv", tokenizer=str(tokenizer), length=4, class_names=["no", "yes"])
    found = texts.load(tokenizer)
    assert found.train_inputs.tolist() == [[2, 1, 3, 5], [4, 0, 0, 0], [6, 6, 6, 6]]
    assert found.train_labels.tolist() == [1, 0, 0]
    assert found.test_inputs.tolist() == [[1, 0, 0, 0]]
    assert texts.declared.class_names == ("no", "yes")


def test_texts_name_their_clients(tokenizer: Path) -> None:
    rows = "".join(f"who{i % 2},film,{i % 3 % 2}\n" for i in range(12))
    (tokenizer / "all.csv").write_text(f"user,sentence,label\n{rows}")
    found = Texts(file="all.csv", tokenizer=str(tokenizer / "tokenizer.json"), client="user").load(tokenizer)
    assert found.natural_population == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"file": "none.tsv"}, "data.file: expected an existing file"),
        ({"text": "words"}, "data.text: expected a column of train.tsv, got 'words'"),
        ({"tokenizer": "none"}, "data.tokenizer: expected an existing path"),
        ({"package": "no_such_package_here"}, "data.package: expected an installed package"),
    ],
)
def test_wrong_files_of_texts_are_one_line(tokenizer: Path, options: dict[str, str], words: str) -> None:
    (tokenizer / "train.tsv").write_text("sentence\tlabel\nbad\t0\n")
    with pytest.raises(UserError, match=words):
        Texts(**{"file": "train.tsv", "tokenizer": str(tokenizer), **options}).load(tokenizer)  # pyright: ignore[reportArgumentType]


def test_a_folder_without_a_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.folder: expected a folder of save_pretrained"):
        TextEncoder(folder=str(tmp_path)).parameters((5,), 2)


def bert(folder: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 12}
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=30, **sizes)).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_an_encoder_in_stages_is_the_encoder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = TextEncoder(folder=str(bert(tmp_path)))
    net = source.build((6,), 2, 0)
    tokens = torch.tensor([[3, 4, 5, 0, 0, 0], [7, 8, 9, 10, 11, 12]]).float()
    mask = (tokens > 0).long()
    encoder = transformers.AutoModel.from_pretrained(tmp_path)
    states = encoder(input_ids=tokens.long(), attention_mask=mask).last_hidden_state
    mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    torch.testing.assert_close(net(tokens), net.head(mean))  # pyright: ignore[reportCallIssue]
    assert source.parameters((6,), 2) == sum(p.numel() for p in net.parameters())
    assert torch.equal(source.build((6,), 2, 0).head.weight, net.head.weight)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]


@pytest.mark.slow
def test_the_layers_below_the_first_adapter_are_kept(tmp_path: Path) -> None:
    source = TextEncoder(folder=str(bert(tmp_path)))
    tokens = torch.tensor([[3, 4, 5, 0, 0, 0], [7, 8, 9, 10, 11, 12]]).float()
    for target, kept in (("layer.2.attention.self.query", 3), ("query", 1)):
        made = Lora(targets=[target], rank=2).adapted(source.build((6,), 2, 0), (6,), 0)
        assert made._first == kept
        assert made.kept_shape == (6, 9)
        assert len(lora_layers(made)) == (1 if kept == 3 else 3)
        with torch.no_grad():
            for parameter in (p for p in made.parameters() if p.requires_grad):
                parameter += 0.1
        torch.testing.assert_close(made(made.lower(tokens)), made(tokens))
        torch.testing.assert_close(merged(made)(tokens), made(tokens))


@pytest.mark.slow
def test_a_network_of_timm_with_a_frozen_body(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    state = timm.create_model("test_resnet", pretrained=False).state_dict()
    torch.save({f"other.{name}": tensor for name, tensor in state.items()}, tmp_path / "weights.pth")
    options = {"architecture": "test_resnet", "weights": str(tmp_path / "weights.pth"), "size": 32}
    with pytest.raises(UserError, match=r'model.weights.*match = "order"'):
        ImageBody(**options).build((3, 8, 8), 4, 0)  # pyright: ignore[reportArgumentType]
    net = ImageBody(**options, match="order").build((3, 8, 8), 4, 0)  # pyright: ignore[reportArgumentType]
    made, images = Head().adapted(net, (3, 8, 8), 0), torch.rand(5, 3, 8, 8)
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    made.train()
    nn.functional.cross_entropy(made(images), torch.arange(5) % 4).backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())
    torch.testing.assert_close(made(made.lower(images)), made(images))
    assert sorted(name for name, p in made.named_parameters() if p.grad is not None) == [
        "inner.head.bias",
        "inner.head.weight",
    ]
    with pytest.raises(UserError, match=r"model.architecture"):
        ImageBody(architecture="no-such-net").build((3, 8, 8), 4, 0)


def test_a_run_on_texts_reads_files_of_texts(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "".join(f"who{i % 2},{'good' if i % 3 else 'bad'} film,{int(i % 3 > 0)}\n" for i in range(12))
    (tmp_path / "all.csv").write_text(f"user,sentence,label\n{rows}")
    settings = {"file": "all.csv", "tokenizer": str(tokenizer), "length": 3, "client": "user"}
    config = load_config(
        {
            "name": "texts",
            "seed": 1,
            "data": {"name": "text", **settings, "partition": "natural", "test": "within"},
            "model": {"name": "softmax"},
            "method": {"name": "dp-fedavg"},
            "training": {"rounds": 0},
        }
    )
    run_experiment(config, tmp_path / "run", engine="loop", data_root=tmp_path)
    trained = load_trained(tmp_path / "run")
    (tmp_path / "new.tsv").write_text('sentence\tlabel\na "good film\t1\n')
    assert read_inputs(trained, tmp_path / "new.tsv").tolist() == [[2.0, 1.0, 3.0]]
    inputs, labels = read_examples(trained, tmp_path / "all.csv")
    assert inputs.shape == (12, 3)
    assert labels.tolist() == [int(i % 3 > 0) for i in range(12)]
    (tmp_path / "other.csv").write_text("words\nfilm\n")
    with pytest.raises(UserError, match=r"data\.text: expected a column of other\.csv, got 'sentence'"):
        read_inputs(trained, tmp_path / "other.csv")
    with pytest.raises(SystemExit) as ended:
        main(["predict", str(tmp_path / "run"), "--inputs", str(tmp_path / "all.csv")])
    assert ended.value.code == 0
    assert capsys.readouterr().out.count("\n") == 13
