import pickle
import time
import tracemalloc
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tvaprune.errors import InputError
from tvaprune.models.shape import ModelShape
from tvaprune.plan.exact_cut import calibrate
from tvaprune.plan.keep_plan import plan_from_masks
from tvaprune.plan.masks import load_masks, save_masks
from tvaprune.plan.widths import WidthRules

PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "published_masks"
SIZES = dict(
    hidden_size=9,
    num_hidden_layers=12,  # two digits: layer 10 does not sort before layer 2
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    intermediate_size=5,
    vocab_size=7,
)
SHAPE = ModelShape.uniform(**SIZES)


def mask_dict(num_layers=2):
    content = {}
    for name in ("mu", "logD"):
        content[f"hidden_mask_z_{name}"] = torch.randn(9)
        for i in range(num_layers):
            content[f"attn_layer{i}_z_{name}"] = torch.randn(2)
            content[f"inter_layer{i}_z_{name}"] = torch.randn(5)
    return content


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "mask_info_1.0.pkl"
        path.write_bytes(pickle.dumps(content))
        return path

    return write


def test_round_trip_is_bitwise_and_writes_one_file(make_masks, tmp_path):
    masks = make_masks(SHAPE)
    save_masks(masks, tmp_path / "mask_info_1.0.pkl")
    loaded = load_masks(tmp_path / "mask_info_1.0.pkl")
    for saved, read in ((masks.mu, loaded.mu), (masks.log_variance, loaded.log_variance)):
        assert all(torch.equal(a, b) for a, b in zip(saved, read, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["mask_info_1.0.pkl"]
    loaded.check_fits(SHAPE, "the mask")


def test_the_file_is_the_released_format(make_masks, tmp_path):
    masks = make_masks(SHAPE)
    save_masks(masks, tmp_path / "masks.pkl")
    content = pickle.loads((tmp_path / "masks.pkl").read_bytes())
    assert set(content) == set(mask_dict(SHAPE.num_hidden_layers))
    assert all(type(v) is torch.Tensor and v.dtype == torch.float32 for v in content.values())
    assert torch.equal(content["attn_layer10_z_mu"], masks.mu.attn[10])
    assert torch.equal(content["inter_layer11_z_logD"], masks.log_variance.inter[11])


def test_what_norms_divide_by_goes_with_the_mask(make_masks, tmp_path):
    path = tmp_path / "mask_info_1.0.pkl"
    save_masks(replace(make_masks(SHAPE), keeps_norm_width=True), path)
    content = pickle.loads(path.read_bytes())
    assert set(content) == {*mask_dict(SHAPE.num_hidden_layers), "norm_width"} and content["norm_width"].tolist() == [9]
    loaded = load_masks(path, SHAPE)
    assert calibrate(loaded, SHAPE, 0.5).keeps_norm_width and plan_from_masks(loaded, SHAPE).keeps_norm_width
    save_masks(make_masks(SHAPE), path)  # control: a released one says nothing
    assert not load_masks(path).keeps_norm_width and not plan_from_masks(load_masks(path), SHAPE).keeps_norm_width


@pytest.mark.parametrize("value", [torch.ones(2), torch.tensor(9.0), torch.tensor([8.0]), "9"])
def test_a_norm_width_of_another_mask_is_refused(value, write):
    with pytest.raises(InputError, match="its norm_width is not that of its 9 hidden dims; give a whole mask_info"):
        load_masks(write(mask_dict() | {"norm_width": value}))


def test_trained_parameters_are_saved_as_plain_tensors(make_masks, tmp_path):
    masks = make_masks(SHAPE)
    trained = type(masks)(*(v.map(torch.nn.Parameter) for v in (masks.mu, masks.log_variance)))
    save_masks(trained, tmp_path / "masks.pkl")
    loaded = load_masks(tmp_path / "masks.pkl")
    assert all(type(v) is torch.Tensor and not v.requires_grad for v in (*loaded.mu, *loaded.log_variance))
    assert all(torch.equal(a, b) for a, b in zip(masks.mu, loaded.mu, strict=True))


def test_float64_is_read_as_float32(write):
    loaded = load_masks(write({key: value.double() for key, value in mask_dict().items()}))
    assert {v.dtype for v in (*loaded.mu, *loaded.log_variance)} == {torch.float32}


class Evil:
    def __init__(self, call, *args):
        self.reduced = call, args

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("hidden_in", [lambda evil: evil, lambda evil: mask_dict() | {"hidden_mask_z_mu": evil}])
def test_a_malicious_pickle_is_not_executed(hidden_in, write, tmp_path):
    trace = tmp_path / "executed"
    path = write(hidden_in(Evil(exec, f"open({str(trace)!r}, 'w').close()")))
    with pytest.raises(InputError, match="asks to run 'builtins.exec': a mask holds tensors only"):
        load_masks(path)
    assert not trace.exists()
    pickle.loads(path.read_bytes())  # control: pickle would have
    assert trace.exists()


def test_code_within_the_bytes_of_a_tensor_is_not_executed(write, tmp_path):
    trace, inner = tmp_path / "executed", tmp_path / "inner"
    torch.save(Evil(exec, f"open({str(trace)!r}, 'w').close()"), inner)
    path = write(mask_dict() | {"hidden_mask_z_mu": Evil(torch.storage._load_from_bytes, inner.read_bytes())})
    with pytest.raises(InputError, match="not a readable mask file"):
        load_masks(path)
    assert not trace.exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_refused(share, write):
    path = write(mask_dict())
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match="not a readable mask file .*perhaps truncated"):
        load_masks(path)


def test_a_byte_lost_among_the_numbers_is_refused(make_masks, tmp_path):
    """Python's bytes are longer by what follows them: without a look at the frame every number behind it moves."""
    path = tmp_path / "mask_info_1.0.pkl"
    save_masks(make_masks(SHAPE), path)
    content = path.read_bytes()
    place = content.index(make_masks(SHAPE).mu.inter[5].numpy().tobytes()) + 9
    path.write_bytes(content[:place] + content[place + 1 :])
    with pytest.raises(InputError, match="not a readable mask file"):
        load_masks(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="is a folder; give a mask_info"):
        load_masks(tmp_path)
    with pytest.raises(InputError, match="nothing.pkl: there is no such file; give a mask_info"):
        load_masks(tmp_path / "nothing.pkl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lm_head.weight": torch.ones(3)}, "'lm_head.weight' is no gate of a mask file"),
        ({"mu": torch.ones(9)}, "'mu' is no gate of a mask file"),
        ({"hidden_mask_z_mu": "text"}, "'hidden_mask_z_mu' is no gate"),
        ({"hidden_mask_z_mu": torch.ones(3, 3)}, "'hidden_mask_z_mu' is no gate"),
        ({3: torch.ones(3)}, "3 is no gate"),
        ({"attn_layer1_z_mu": torch.tensor([1.0, float("nan")])}, "'attn_layer1_z_mu' holds NaN or infinity"),
        ({"inter_layer0_z_logD": torch.full((5,), -float("inf"))}, "'inter_layer0_z_logD' holds NaN or infinity"),
        ({"inter_layer0_z_mu": torch.ones(4)}, "means and log-variances differ in size"),
        ({"attn_layer3_z_mu": torch.ones(2)}, "gates are missing"),  # but no layer 2
    ],
)
def test_a_mask_with_a_foreign_entry_is_refused(change, message, write):
    with pytest.raises(InputError, match=message):
        load_masks(write(mask_dict() | change))


@pytest.mark.parametrize("missing", sorted(mask_dict()))
def test_a_mask_without_one_of_its_gates_is_refused(missing, write):
    content = mask_dict()
    del content[missing]
    with pytest.raises(InputError, match="gates are missing"):
        load_masks(write(content))


@pytest.mark.parametrize("content", [{}, OrderedDict(), [torch.ones(9)], torch.ones(9), 3, None])
def test_something_else_than_a_mask_is_refused(content, write):
    with pytest.raises(InputError, match="gates are missing"):
        load_masks(write(content))


@pytest.mark.parametrize("size", ["hidden_size", "num_hidden_layers", "num_key_value_heads", "intermediate_size"])
def test_the_mask_of_another_model_is_refused(size, make_masks):
    other = ModelShape.uniform(**(SIZES | {size: SIZES[size] - 1}))
    make_masks(SHAPE).check_fits(SHAPE, "--mask_loc m.pkl")
    with pytest.raises(InputError, match=r"--mask_loc m.pkl holds 9 hidden, 12 layers of \[2\] KV heads and \[5\] MLP"):
        make_masks(SHAPE).check_fits(other, "--mask_loc m.pkl")


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published masks are not beside this checkout")
@pytest.mark.parametrize(
    ("pattern", "hidden", "fewest_heads", "empty_layers"),
    [("mistral_7b_*.pkl", 3171, 2, []), ("llama3_8b_*.pkl", 4045, 0, [24, 27])],
)
def test_published_masks(pattern, hidden, fewest_heads, empty_layers, tmp_path):
    (path,) = PUBLISHED.glob(pattern)
    masks = load_masks(path)
    vocab_size = 32000 if "mistral" in pattern else 128256
    shape = ModelShape.uniform(4096, 32, 32, 8, 128, 14336, vocab_size)
    masks.check_fits(shape, str(path))
    assert int((masks.log_alpha.hidden < 0).sum()) == hidden
    plan = plan_from_masks(masks, shape)
    assert plan.hidden_size == hidden
    assert (min(plan.num_key_value_heads), max(plan.num_key_value_heads)) == (fewest_heads, 8)
    assert [i for i, n in enumerate(plan.num_key_value_heads) if n == 0] == empty_layers
    save_masks(masks, tmp_path / path.name)
    again = load_masks(tmp_path / path.name)
    assert all(torch.equal(a, b) for a, b in zip(masks.mu, again.mu, strict=True))
    for target in (0.2, 0.5):  # seven billion parameters leave room for any target
        plan = plan_from_masks(
            calibrate(masks, shape, target, WidthRules(dim_multiple=128)), shape, WidthRules(dim_multiple=128)
        )
        assert abs(plan.sparsity - target) < 0.005
        assert not any(width % 128 for width in (plan.hidden_size, *plan.intermediate_size))


def rebuilt(*arguments):
    """What pickles as a tensor that is rebuilt with these arguments."""
    return Evil(torch._utils._rebuild_tensor_v2, *arguments)


def storage(values):
    untyped = torch.tensor(values).untyped_storage()
    return torch.storage.TypedStorage(wrap_storage=untyped, dtype=torch.float32, _internal=True)


def tensor_lies():
    """Name -> what stands for the hidden means, what the refusal says."""
    nine = [0.5] * 9
    return {
        "another size": (rebuilt(storage(nine), 0, (10**9,), (1,), False, OrderedDict()), "1000000000 elements from 0"),
        "an offset": (rebuilt(storage(nine), 5, (9,), (1,), False, OrderedDict()), "9 elements from 5 on, in a storag"),
        "a negative offset": (rebuilt(storage(nine), -1, (9,), (1,), False, OrderedDict()), "without a storage or a s"),
        "a stride of 0": (rebuilt(storage(nine), 0, (9,), (0,), False, OrderedDict()), r"size \(9,\) with strides \(0"),
        "a long stride": (rebuilt(storage(nine), 0, (9,), (9,), False, OrderedDict()), r"size \(9,\) with strides \(9"),
        "no storage": (rebuilt(b"123", 0, (9,), (1,), False, OrderedDict()), "without a storage"),
        "integers": (torch.arange(9), "holds a 'torch.LongStorage': a mask's numbers are floating-point"),
        "truth values": (torch.ones(9) > 0, "holds a 'torch.BoolStorage': a mask's numbers are floating-point"),
    }


@pytest.mark.parametrize("lie", tensor_lies())
def test_a_tensor_is_within_its_storage_and_of_floating_point(lie, write):
    stands, message = tensor_lies()[lie]
    begin = time.perf_counter()
    with pytest.raises(InputError, match=message):
        load_masks(write(mask_dict() | {"hidden_mask_z_mu": stands}))
    assert time.perf_counter() - begin < 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_point_is_read_as_it_is(dtype, write):
    content = {key: value.to(dtype) for key, value in mask_dict().items()}
    loaded = load_masks(write(content))
    assert torch.equal(loaded.mu.inter[1], content["inter_layer1_z_mu"].float())


def test_a_part_of_a_storage_is_read_as_it_is(write):
    whole = torch.randn(30)
    loaded = load_masks(write(mask_dict() | {"hidden_mask_z_mu": whole[7:16]}))
    assert torch.equal(loaded.mu.hidden, whole[7:16])


def test_a_number_that_float32_cannot_hold_is_refused(write):
    with pytest.raises(InputError, match="'hidden_mask_z_mu' holds NaN or infinity"):
        load_masks(write(mask_dict() | {"hidden_mask_z_mu": torch.full((9,), 1e300, dtype=torch.float64)}))


def test_a_storage_that_many_tensors_claim_is_refused(write):
    shared = torch.randn(4000)
    content = {f"inter_layer{layer}_z_{name}": shared for layer in range(50) for name in ("mu", "logD")}
    with pytest.raises(InputError, match="its tensors claim more than the file holds"):
        load_masks(write(content))


def nested_key(depth=60):
    """A pickle of a dict whose key takes 2**depth steps to hash."""
    twice = b"h\x00h\x00\x86q\x00"  # the memo's entry, twice, as a tuple, into the memo
    return b"\x80\x02}(" + b"K\x01q\x00" + twice * depth + b"K\x01u."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (nested_key(), "a key that is no text|a damaged pickle"),
        (b"\x80\x02}r\xff\xff\xff\xff.", "gates are missing"),  # a memo of 4 billion entries
        (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.", "not a readable mask file .bytes are lost"),  # a frame
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fx.", "not a readable mask file"),  # bytes
        (b"\x80\x02ccollections\nOrderedDict\n)R}X\x01\x00\x00\x00aK\x01sb.", "BUILD is not among what tensors"),
        (b"\x80\x02" + b"(" * 100_000 + b".", "not a readable mask file"),
        (b"\x80\x02" + b"}" * 600_000 + b".", "more steps than a mask takes"),
        (b"\x80\x02}.}.", "bytes behind the end"),
    ],
    ids=["nested key", "memo", "frame", "bytes", "BUILD", "marks", "steps", "a second pickle"],
)
def test_a_small_file_takes_neither_memory_nor_time(content, message, tmp_path):
    path = tmp_path / "mask_info_1.0.pkl"
    path.write_bytes(content)
    tracemalloc.start()
    begin = time.perf_counter()
    with pytest.raises(InputError, match=message) as error:
        load_masks(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.perf_counter() - begin < 20 and peak < 200 * 2**20 and "\n" not in str(error.value)


def test_a_key_forges_no_line(write):
    with pytest.raises(InputError) as error:
        load_masks(write(mask_dict() | {"\nresults: 1.0\x1b[2J": torch.ones(2)}))
    assert str(error.value).isprintable() and r"'\nresults: 1.0\x1b[2J' is no gate" in str(error.value)


def test_a_file_larger_than_the_models_mask_is_not_read(make_masks, tmp_path, monkeypatch):
    path = tmp_path / "mask_info_1.0.pkl"
    save_masks(make_masks(SHAPE), path)
    load_masks(path, SHAPE)  # control
    with path.open("ab") as file:
        file.truncate(2**20)
    monkeypatch.setattr("tvaprune.plan.masks.read_tensors", lambda content: pytest.fail("was read"))
    with pytest.raises(InputError, match="a file of 1,048,576 bytes, the mask of this model takes at most"):
        load_masks(path, SHAPE)
    with path.open("ab") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(InputError, match="the mask of any model takes at most 268,435,456"):
        load_masks(path)
