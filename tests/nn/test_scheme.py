"""Schemes: what their names mean, and that a name, a dict and a Scheme are the same thing."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttaq.errors import InputError
from ttaq.scheme import PRESETS, LayerBits, Scheme

BITS = st.one_of(st.none(), st.integers(2, 8))
OVERRIDES = st.lists(
    st.tuples(st.sampled_from(["fc", "layer3.*", "*.conv?"]), st.sampled_from(["W8A8", "W4A32", "float"]))
)


@given(
    st.builds(
        Scheme,
        weight_bits=BITS,
        activation_bits=BITS,
        weight_symmetric=st.booleans(),
        activation_symmetric=st.booleans(),
        weight_per_channel=st.booleans(),
        first_last_bits=BITS,
        overrides=OVERRIDES.map(tuple),
        image_bits=BITS,
        quantize_matmul=st.booleans(),
        twin_softmax=st.booleans(),
        twin_gelu=st.booleans(),
    )
)
def test_names_and_dicts_round_trip(scheme: Scheme) -> None:
    assert Scheme.parse(str(scheme)) == scheme
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme
    assert hash(Scheme.parse(str(scheme))) == hash(scheme)


@pytest.mark.parametrize(
    ("name", "scheme", "canonical"),
    [
        ("W8A8", Scheme(), "W8A8"),
        (" w2a4 ", Scheme(2, 4), "W2A4"),
        ("W4A32", Scheme(4, None), "W4A32"),
        ("float", Scheme(None, None), "float"),
        ("W4A4, first_last = none", Scheme(4, 4, first_last_bits=None), "W4A4,first_last=none"),
        ("W4A4,image=8,first_last=4", Scheme(4, 4, image_bits=8, first_last_bits=4), "W4A4,first_last=4,image=8"),
        (
            "W4A4,weight_per_tensor,weight_symmetric",
            Scheme(4, 4, weight_symmetric=True, weight_per_channel=False),
            "W4A4,weight_symmetric,weight_per_tensor",
        ),
        (
            "W6A6,uniform_gelu,float_matmul,uniform_softmax",
            Scheme(6, 6, quantize_matmul=False, twin_softmax=False, twin_gelu=False),
            "W6A6,float_matmul,uniform_softmax,uniform_gelu",
        ),
        (
            "W4A4,layer3.*=w8a8,fc=W32A32",
            Scheme(4, 4, overrides=(("layer3.*", "W8A8"), ("fc", "float"))),
            "W4A4,layer3.*=W8A8,fc=float",
        ),
    ],
)
def test_names(name: str, scheme: Scheme, canonical: str) -> None:
    assert Scheme.parse(name) == scheme
    assert str(scheme) == canonical


def test_presets_are_names() -> None:
    assert [str(Scheme.parse(name)) for name in PRESETS] == list(PRESETS)


@pytest.mark.parametrize(
    ("scheme", "layer", "position", "bits"),
    [
        ("W4A2", "a", "inner", (4, 2)),
        ("W4A2", "a", "last", (8, 8)),
        ("W4A2", "a", "first", (8, None)),
        ("W4A2,image=6", "a", "first", (8, 6)),
        ("W4A2,first_last=none", "a", "first", (4, None)),
        ("W4A2,first_last=none", "a", "last", (4, 2)),
        ("W4A32", "a", "last", (8, None)),
        ("float", "a", "last", (None, None)),
        ("W4A2,a=W3A3", "a", "last", (3, 3)),
        ("W4A2,a=W3A3", "a", "first", (3, None)),
        ("W4A2,b*=W3A3,b.c=float", "b.c", "inner", (None, None)),
        ("W4A2,b.c=float,b*=W3A3", "b.c", "inner", (3, 3)),
        ("W4A2,b=W3A3", "b.c", "inner", (4, 2)),
    ],
)
def test_bits_of_a_layer(scheme: str, layer: str, position: str, bits: tuple) -> None:
    assert Scheme.parse(scheme).layer(layer, position) == LayerBits(*bits)


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        ("W4A6", 6),
        ("W4A32", None),
        ("W4A6,a.*=W2A3", 3),
        ("W4A6,a.matmul=float", None),
        ("W4A6,float_matmul", None),
        ("W4A6,float_matmul,a.*=W2A3", None),
    ],
)
def test_bits_of_a_product(scheme: str, bits: int | None) -> None:
    assert Scheme.parse(scheme).product("a.matmul") == bits


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "got '', expected W<weight bits>A<activation bits>"),
        ("int8", "got 'int8'"),
        ("W4", "got 'W4'"),
        ("W1A4", "got 'W1A4'"),
        ("W4A9", "2 to 8 bits each"),
        ("W4A4,first_last=9", "first_last_bits is 9, expected 2 to 8, or None"),
        ("W4A4,first_last=some", "got 'first_last=some'"),
        ("W4A4,frist_last=none", "got 'none', expected W<weight bits>"),
        ("W4A4,symmetric", "got 'symmetric' in 'W4A4,symmetric'"),
        ("W4A4,weight_symmetric=yes", "got 'yes'"),
        ("W4A4,fc=W9A9", "got 'W9A9'"),
        ("W4A4,,", "got ''"),
        (None, "got a NoneType"),
    ],
)
def test_bad_names(name: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        Scheme.parse(name)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight_bits": 1}, "weight_bits is 1, expected 2 to 8"),
        ({"weight_bits": "W4A4"}, "weight_bits is 'W4A4'"),
        ({"activation_bits": True}, "activation_bits is True"),
        ({"image_bits": 16}, "image_bits is 16"),
        ({"weight_symmetric": 1}, "weight_symmetric is 1, expected True or False"),
        ({"overrides": (("fc",),)}, "override ('fc',)"),
        ({"overrides": (("a,b", "W4A4"),)}, "override pattern 'a,b'"),
        ({"overrides": (("first_last", "W4A4"),)}, "override pattern 'first_last'"),
        ({"bits": 4}, "unknown fields bits"),
    ],
)
def test_bad_fields(fields: dict, message: str) -> None:
    with pytest.raises(InputError) as caught:
        Scheme.from_dict(fields)
    assert message in str(caught.value)
