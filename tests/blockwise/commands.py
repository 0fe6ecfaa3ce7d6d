"""How the tests of the stages that go block by block start the entry."""

ALL = "[oneshot, sds, reconstruct]"


def options(model, text_file, folder, *more) -> list[str]:
    words = ["--output_dir", folder, "--model.path", model, "--calibration.corpus", text_file]
    words += ["--calibration.sequences", 20, "--calibration.length", 48]
    words += ["--calibration.held_out", 6, "--runtime.device", "cpu"]
    return [str(w) for w in [*words, *more]]
