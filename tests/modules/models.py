"""Small models that are awkward for an ensemble, each in its own way. Data tensors are (B, 3, 32, 32) or token ids."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

IMAGES = (2, 3, 32, 32)
TOKENS = (2, 7)


class Tied(nn.Module):
    """The embedding is also the output layer, used without calling its module."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.body = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.body(self.embed(tokens)).mean(1)
        return self.head(self.norm(x))


class Borrower(nn.Module):
    """Uses a generated tensor before, and without, calling the module that owns it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.scale = nn.LayerNorm(6)

    def forward(self, x):
        x = self.first(x) * self.scale.weight
        return self.scale(self.second(x))


class Smuggler(nn.Module):
    """A module that reaches a generated tensor through a reference that is not registered."""

    def __init__(self):
        super().__init__()
        self.thief = Thief()
        self.late = nn.Linear(6, 6)
        self.victim = nn.Linear(6, 6)
        self.thief.__dict__["owner"] = self.victim

    def forward(self, x):
        return self.victim(self.late(self.thief(x)))


class Thief(nn.Module):
    def __init__(self):
        super().__init__()
        self.own = nn.Linear(6, 6)

    def forward(self, x):
        return self.own(x) + self.owner.bias


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return (x * weight) ** 2

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


class Custom(nn.Module):
    """A custom function takes the generated tensor, which torch functions never see."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(6))
        self.after = nn.Linear(6, 6)

    def forward(self, x):
        return self.after(Square.apply(x, self.gain))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, tokens):
        return self.head(self.lstm(self.embed(tokens))[0][:, -1])


class Branching(nn.Module):
    """What runs depends on member-specific values, and so does a write into what the trunk gave."""

    def __init__(self, in_place=True):
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.gate = nn.Linear(6, 1)
        self.head = nn.Linear(6, 4)
        self.in_place = in_place

    def forward(self, x):
        h = self.body(x)
        if (40 * self.gate(h)[0]).sin() > 0:  # changes from member to member
            h = h.mul_(-2.0) if self.in_place else h * -2.0
        return self.head(h[h.sum(1) > -100])


class Careless(nn.Module):
    """Writes into its input, relies on in-place activations, shares views, and mutates a list and a dictionary."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.act = nn.ReLU(inplace=True)
        self.same = nn.Identity()
        self.view = nn.Unflatten(1, (2, 3))
        self.many = Several()
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x.sub_(0.5)
        h = self.stem(x)
        self.act(h)  # the result is not used: h itself has changed
        also = self.same(h)
        view = self.view(also)
        found = self.many(h)
        first = found["items"].pop()
        found["items"].append(first * 2)
        y = self.norm(h)
        view += 1.0  # changes h, also and view
        y += h + also
        first.add_(y)
        return self.head(first + sum(found["items"]))


class Several(nn.Module):
    def forward(self, x):
        return {"items": [x.sin(), x.cos()], "count": 2}


class ReadsThenWrites(nn.Module):
    """Root code reads an output before a clean module overwrites it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.act = nn.ReLU(inplace=True)
        self.late = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        h = self.stem(x)
        before = h * 3.0
        return self.head(self.late(self.act(h)) + before)


class Blocks(nn.Module):
    """A stack that is never called as a whole, one module called twice, and a model output with keywords."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(6))
        self.act = nn.GELU()
        self.head = nn.Linear(6, 4)

    def forward(self, *, x, scale=1.0):
        for block in self.blocks:
            x = self.act(block(x)) * scale
        return {"logits": self.head(x), "hidden": x}


class Opaque(nn.Module):
    """The trunk returns an object that nobody knows how to copy."""

    def __init__(self):
        super().__init__()
        self.trunk = OpaqueTrunk()
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.trunk(x).value)


class OpaqueTrunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 6))

    def forward(self, x):
        return Box(self.inner(x))


class Box:
    def __init__(self, value):
        self.value = value


class Stateful(nn.Module):
    """The trunk leaves something behind in Python that the tail takes away: replaying it cannot be exact."""

    def __init__(self):
        super().__init__()
        self.trunk = Leaver()
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        self.trunk.left.clear()
        self.trunk(x)
        return self.head(self.trunk.left.pop() if self.trunk.left else torch.zeros_like(x))


class Leaver(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.left = []

    def forward(self, x):
        self.left.append(self.linear(x))
        return None


def timm_model(name, **options):
    timm = pytest.importorskip("timm")
    return timm.create_model(name, num_classes=10, **options)


def small_vit():
    return timm_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=3)


def small_convnext():
    return timm_model("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32))


HF_SIZE = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 48}


def hf_vit():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=10, **HF_SIZE)
    return transformers.ViTForImageClassification(config)


def hf_bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=20, max_position_embeddings=16, num_labels=5, **HF_SIZE)
    return transformers.BertForSequenceClassification(config)


def hf_gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_positions=16, n_embd=24, n_layer=4, n_head=3, num_labels=5)
    config.pad_token_id = 0
    return transformers.GPT2ForSequenceClassification(config)


def transformer_encoder():
    layer = nn.TransformerEncoderLayer(12, 3, 24, batch_first=True)
    return nn.Sequential(nn.Embedding(20, 12), nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), Pool())


class Pool(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(F.relu(x.mean(1)))
