from __future__ import annotations

import pytest
import torch

from nbaccel.core.precision import Hardware, ScalerOptions, choose_precision, probe_hardware
from nbaccel.errors import ConfigError
from nbaccel.fp8 import FP8Options

AMPERE = Hardware(name="an A100", device_type="cuda", bf16=True, fp16=True)
HOPPER = Hardware(name="an H100", device_type="cuda", bf16=True, fp16=True, fp8=True)
TURING = Hardware(name="a T4", device_type="cuda", bf16=False, fp16=True)
OLD_CPU = Hardware(name="an old CPU", device_type="cpu", bf16=False, fp16=False)


@pytest.mark.parametrize(("hardware", "kind"), [(AMPERE, "bf16"), (TURING, "fp16"), (OLD_CPU, "no")])
def test_auto_when_on_different_hardware_says_what_and_why(hardware, kind, capsys):
    assert choose_precision("auto", hardware).kind == kind
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert hardware.name in said


def test_bf16_when_emulated_warns_with_the_alternative():
    with pytest.warns(UserWarning, match=r"emulated.*a T4.*'fp16'"):
        assert choose_precision("bf16", TURING).dtype is torch.bfloat16
    with pytest.warns(UserWarning, match=r"an old CPU.*'no'"):
        choose_precision("bf16", OLD_CPU)


def test_bf16_when_real_or_not_rank_0_says_nothing(recwarn):
    choose_precision("bf16", AMPERE)
    choose_precision("bf16", TURING, speak=False)
    assert not recwarn.list


def test_fp8_when_emulated_warns_and_the_rest_is_bf16():
    with pytest.warns(UserWarning, match=r"'fp8' is emulated.*an A100.*'bf16'"):
        precision = choose_precision("fp8", AMPERE, fp8=FP8Options(recipe="rowwise"))
    assert (precision.dtype, precision.fp8.recipe, precision.emulates_fp8) == (
        torch.bfloat16,
        "rowwise",
        True,
    )
    assert not choose_precision("fp8", HOPPER).emulates_fp8
    assert choose_precision("bf16", HOPPER).fp8 is None


def test_precision_when_unsupported_names_what_is():
    with pytest.raises(ConfigError, match="'no', 'bf16', 'fp16', 'fp8'"):
        choose_precision("fp15", AMPERE)


def test_scaler_when_fp16_has_the_options():
    precision = choose_precision("fp16", OLD_CPU, scaler=ScalerOptions(init_scale=8.0, growth_interval=7))
    scaler = precision.make_scaler()
    assert scaler is not None
    assert scaler.is_enabled()
    assert scaler.get_scale() == 8.0
    assert scaler.get_growth_interval() == 7
    assert choose_precision("no", OLD_CPU).make_scaler() is None


def test_probe_when_on_this_cpu_follows_its_flags():
    hardware = probe_hardware(torch.device("cpu"))
    with open("/proc/cpuinfo") as file:
        text = file.read()
    assert hardware.bf16 == any(
        flag in text for flag in ("avx512_bf16", "amx_bf16", "avx_ne_convert", " bf16")
    )
