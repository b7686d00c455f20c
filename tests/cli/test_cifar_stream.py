"""The commands on the real CIFAR-10 and a real ResNet-20."""

from pathlib import Path

from ttaq.cli import main
from ttaq.eval import read_rows


def test_norm_statistics_help_a_blurred_four_bit_resnet20(data_folder: Path, tmp_path: Path) -> None:
    plain = f"cifar_resnet20:{data_folder / 'models' / 'cifar10_resnet20.safetensors'}"
    quantized, rows = str(tmp_path / "q.safetensors"), tmp_path / "rows.jsonl"
    shared = ["--dataset", "cifar10", "--data", str(data_folder)]
    assert (
        main(["quantize", "--model", plain, *shared, "--scheme", "W4A4", "--calibration", "64", "--out", quantized])
        == 0
    )
    stream = ["--corruptions", "gaussian_blur", "--split", "validate", "--images", "200", "--batch-size", "100"]
    argv = ["adapt", "--model", plain, "--model", quantized, *shared, *stream, "--methods", "source,norm"]
    assert main([*argv, "--out", str(rows)]) == 0
    errors = {(row["scheme"], row["method"]): row["error"] for row in read_rows(rows) if row["kind"] == "domain"}
    # About 58, 15, 59 and 25 % on these 200 images; the limits leave room for other calibration images.
    assert errors["float", "norm"] < 25 < 45 < errors["float", "source"]
    assert errors["W4A4", "norm"] < 40 < 45 < errors["W4A4", "source"]
