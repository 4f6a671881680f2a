"""Reading videos, and videos on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import refused, run
from PIL import Image, ImageDraw

from mmtok_cli.data.datasets import open_dataset
from mmtok_cli.data.videos import open_video, video_of_arrays
from mmtok_cli.errors import MMTokError
from mmtok_cli.video import Sampling, Video

RATE, COUNT = 12, 24


def frame(number: int, size: tuple[int, int] = (112, 84)) -> Image.Image:
    """A number of white stripes that grows with time, so that decoded frames can be told apart."""
    image = Image.new("RGB", size, "black")
    ImageDraw.Draw(image).rectangle((0, 0, 4 * number + 3, size[1]), fill="white")
    return image


def number_of(image: Image.Image) -> int:
    return round(float((np.asarray(image.convert("L"))[10] > 127).sum()) / 4) - 1


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds of 12 frames each."""
    av = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 112, 84, "yuv420p"
        for number in range(COUNT):
            container.mux(stream.encode(av.VideoFrame.from_image(frame(number))))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("frames") / "walk"
    path.mkdir()
    for number in range(COUNT):
        frame(number).save(path / f"{number:04d}.png")
    (path / "notes.txt").write_text("not a frame")
    return path


@pytest.mark.parametrize("kind", ["clip", "folder"])
@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(frames=4), [0, 8, 15, 23]),
        (Sampling(frames=1), [0]),
        (Sampling(frames=100), list(range(24))),
        (Sampling(fps=2, folder_fps=RATE), [0, 8, 15, 23]),
        (Sampling(fps=0.1, folder_fps=RATE), [0]),
    ],
)
def test_frames_are_evenly_spaced(
    kind: str, sampling: Sampling, expected: list[int], request: pytest.FixtureRequest
) -> None:
    video = open_video(request.getfixturevalue(kind), Sampling(sampling.frames, sampling.fps, folder_fps=RATE))
    assert [number_of(image) for image in video.frames.images] == expected
    assert video.frames.times == pytest.approx([number / RATE for number in expected])
    assert video.frames.fps == pytest.approx(len(expected) / (COUNT / RATE))
    assert video.size == (112, 84)


def test_decoding_again_reads_the_file_again(clip: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(clip.read_bytes())
    video = open_video(copy, Sampling(frames=3))
    assert len(video) == 3
    copy.unlink()
    assert len(video) == 3  # frames are kept
    with pytest.raises(MMTokError, match=r"copy\.mp4"):
        video.decoded()


def test_arrays_are_videos() -> None:
    video = video_of_arrays(np.stack([np.asarray(frame(n)) for n in range(4)]), fps=2)
    assert len(video) == 4 and video.frames.times == (0, 0.5, 1, 1.5) and number_of(video.frames.images[3]) == 3
    for wrong in (np.zeros((4, 8, 8)), np.zeros((0, 8, 8, 3), np.uint8), np.zeros((4, 8, 8, 3))):
        with pytest.raises(MMTokError, match="are not a video"):
            video_of_arrays(wrong)


def test_python_takes_files_folders_and_arrays(qwen: Path, clip: Path, folder: Path) -> None:
    import mmtok_cli as mmtok

    model = mmtok.load_model(str(qwen))
    arrays = mmtok.video_of_arrays(np.stack([np.asarray(frame(n)) for n in range(4)]), fps=2)
    for given in (clip, str(folder), arrays):
        sample = mmtok.load_sample(given, QUESTION, sampling=Sampling(frames=4))
        assert isinstance(sample.images[0], Video) and len(sample.images[0]) == 4
        kept = mmtok.answer(model, "mmtok", sample, "20%", max_new_tokens=1).reduced.tokens[0]
        assert kept.kept == int(0.2 * kept.total)


def test_a_rotated_video_stands_upright(clip: Path) -> None:
    """Phones store the rotation beside the pictures."""
    av = pytest.importorskip("av")

    class Frame:
        rotation = 90

        def to_image(self) -> Image.Image:
            return frame(3)

    from mmtok_cli.data import videos

    class Container:
        def decode(self, stream: Any) -> list[Frame]:
            return [Frame()]

    assert av and videos._images(clip, None, Container(), [0], 1)[0].size == (84, 112)


def test_a_clip_cut_without_encoding_begins_at_its_first_shown_frame(tmp_path: Path) -> None:
    """The frames from the key frame to the cut are in the file, marked as not to be shown."""
    av = pytest.importorskip("av")
    whole, cut = tmp_path / "whole.mp4", tmp_path / "cut.mp4"
    with av.open(str(whole), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE, options={"g": str(COUNT)})
        stream.width, stream.height, stream.pix_fmt = 112, 84, "yuv420p"
        for number in range(COUNT):
            container.mux(stream.encode(av.VideoFrame.from_image(frame(number))))
        container.mux(stream.encode())
    with av.open(str(whole)) as source, av.open(str(cut), "w", options={"avoid_negative_ts": "disabled"}) as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                earlier = round(0.5 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - earlier, packet.dts - earlier, stream
                container.mux(packet)
    frames = open_video(cut, Sampling(frames=3)).frames
    assert [number_of(image) for image in frames.images] == [6, 14, 23]
    assert frames.times == pytest.approx([0, 8 / RATE, 17 / RATE])


def test_frames_without_times_of_their_own_are_read(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "still.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 112, 84, "yuvj420p"
        pictures = [av.VideoFrame.from_image(frame(number)) for number in range(3)]
        for packet in [packet for picture in (*pictures, None) for packet in stream.encode(picture)]:
            packet.pts = packet.dts = 0
            container.mux(packet)
    frames = open_video(path).frames
    assert frames.times == (0, 0, 0) and frames.fps == 3


def test_numbers_in_the_names_of_frames_are_sorted_by_value(tmp_path: Path) -> None:
    for number in range(12):
        frame(number).save(tmp_path / f"{number}.png")
    assert [number_of(image) for image in open_video(tmp_path).frames.images] == list(range(12))


def broken(folder: Path) -> dict[str, tuple[Path, str]]:
    text, empty, sizes, cut = folder / "text.mp4", folder / "empty", folder / "sizes", folder / "nothing.mp4"
    text.write_text("not a video")
    empty.mkdir()
    sizes.mkdir()
    frame(1).save(sizes / "a.png")
    frame(1, (80, 60)).save(sizes / "b.png")
    cut.write_bytes(b"")
    return {
        "text": (text, "damaged or not a video"),
        "empty file": (cut, "damaged or not a video"),
        "empty folder": (empty, "there is no image"),
        "sizes": (sizes, "another size"),
        "missing": (folder / "missing.mp4", "there is no file"),
    }


def test_what_is_no_video_is_said(tmp_path: Path) -> None:
    pytest.importorskip("av")
    for path, message in broken(tmp_path).values():
        with pytest.raises(MMTokError, match=message):
            _ = open_video(path).frames


def test_a_truncated_file_is_damaged(clip: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    with pytest.raises(MMTokError, match="damaged"):
        _ = open_video(cut).frames


def test_without_pyav_the_extra_is_named(clip: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MMTokError, match="PyAV") as caught:
        open_video(clip)
    assert "mmtok[video]" in caught.value.hint
    assert len(open_video(folder)) == 16  # folders need no decoder


# On the command line, with a model that sees videos.

Directory = Callable[[str], Path]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import FAMILIES

    path = tmp_path_factory.mktemp("models") / "qwen"
    model = FAMILIES["qwen2_5_vl"]("sdpa")
    model.model.save_pretrained(path)
    model.processor.save_pretrained(path)
    return path


QUESTION = "What color is the star?"


def test_infer_answers_about_a_video(qwen: Path, clip: Path) -> None:
    options = ("--model", qwen, "--budget", "20%", "--frames", 8, "--max-new-tokens", 2, "--baseline", "--json")
    found = json.loads(run("infer", clip, QUESTION, *options).stdout)
    assert found["tokens"]["kept"] == int(0.2 * found["tokens"]["total"]) and found["seconds"]["decode video"] > 0
    whole = found["baseline"]["seconds"]
    assert whole["ttft"] >= whole["decode video"] + whole["encode"]
    assert found["frames"] == [8]
    shown = run("infer", clip, QUESTION, *options[:-1]).stdout
    assert "decode video" in shown and "frames sampled: 8" in shown


def test_prune_draws_a_sheet_of_frames(qwen: Path, folder: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    options = ("--model", qwen, "--method", "evs", "--budget", "50%", "--frames", 6)
    shown = run("prune", folder, QUESTION, *options, "--output", sheet)
    assert "3 slices of" in shown.stdout and "0.0 s" in shown.stdout
    with Image.open(sheet) as picture:
        assert picture.width > 112 and picture.height > 84
    found = json.loads(run("prune", folder, QUESTION, *options, "--json").stdout)
    (entry,) = found["images"]
    assert len(entry["panels"]) == 3 and len(entry["panels"][0]["kept"]) == entry["total"] // 3
    assert entry["kept"] == sum(len(panel["kept"]) for panel in entry["panels"]) and entry["frames"] == 6
    one = run("prune", folder, QUESTION, "--model", qwen, "--frames", 1, "--budget", 4).stdout
    assert "(1 slice of 10x14, 1 frame)" in one
    refused(run("prune", folder, QUESTION, *options, "--output", folder / "0001.png"), "which this command reads")


def test_profile_times_the_decoding_of_a_video(qwen: Path, clip: Path, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    options = ("--budget", "20%", "--frames", 4, "--rounds", 2, "--warmup", 1, "--max-new-tokens", 2)
    shown = run("profile", clip, "--model", qwen, *options, "--trace-dir", tmp_path / "trace", "--export", file)
    assert "4 frames per video" in " ".join(shown.stdout.split())
    cases = json.loads(file.read_text())["cases"]
    assert all(case["seconds"]["decode video"]["median"] > 0 for case in cases)


def test_scaling_takes_more_and_more_frames(qwen: Path, clip: Path, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    options = ("--budget", "20%", "--frames", 4, "--rounds", 1, "--warmup", 0, "--max-new-tokens", 1, "--scaling")
    command = ("profile", clip, "--model", qwen, *options, "--trace-dir", tmp_path / "trace")
    shown = run(*command, "--scaling-frames", "4,8,16", "--export", file)
    assert "4, 8, 16 frames" in " ".join(shown.stderr.split())
    points = json.loads(file.read_text())["scaling"]
    assert [point["frames"] for point in points] == [4, 4, 8, 8, 16, 16]
    assert points[-1]["tokens"] == 4 * points[0]["tokens"] and points[-1]["kept"] < points[-1]["tokens"]
    refused(run(*command, "--scaling-frames", "8,64"), "24 frames")
    refused(run(*command, "--scaling-frames", "x"), "'x' is not a number of frames")
    refused(run(*command, "--scaling-tokens", "576"), "--scaling-tokens is for images")


def rows(path: Path, *entries: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_compare_reads_videos_of_a_data_file(qwen: Path, clip: Path, folder: Path, tmp_path: Path) -> None:
    data = rows(
        tmp_path / "asked.jsonl",
        {"video": str(clip), "question": QUESTION, "answer": "red"},
        {"video": str(folder), "question": "What shape is it?", "answer": "star"},
        {"image": str(folder / "0003.png"), "video": [str(clip)], "question": "<image> What? <image>", "answer": "no"},
    )
    samples = open_dataset(str(data), sampling=Sampling(frames=5)).samples
    assert [len(sample.images) for sample in samples] == [1, 1, 2]
    assert isinstance(samples[2].images[1], Video) and len(samples[2].images[1]) == 5
    assert samples[0].image_ids == (f"{clip} (5 frames)",)
    file = tmp_path / "found.json"
    common = ("compare", "--model", qwen, "--data", data, "--rounds", 2, "--warmup", 0, "--max-new-tokens", 2)
    methods = ("--methods", "mmtok,uniform:frames,resize", "--budget", "40%", "--frames", 4)
    shown = run(*common, *methods, "--run-dir", tmp_path / "run", "--export", file).stdout
    assert "of asked.jsonl, 4 frames per video, " in " ".join(shown.split())
    found = json.loads(file.read_text())
    assert found["schedule"]["sampling"] == "4 frames per video"
    for suffix in ("csv", "md", "html"):
        run("report", tmp_path / "run", "--export", tmp_path / f"found.{suffix}")
        assert "4 frames per video" in (tmp_path / f"found.{suffix}").read_text()
    results = found["results"]
    assert len(results) == 4 and all(result["seconds"]["decode video"]["median"] > 0 for result in results)
    assert all(result["score"] is not None for result in results)
    images = rows(tmp_path / "images.jsonl", {"image": str(folder / "0003.png"), "question": "?", "answer": "no"})
    refused(run("compare", "--model", qwen, "--data", images, "--methods", "evs", "--budget", "40%"), "an image")


def test_the_page_shows_all_frames_of_the_unreduced_video(qwen: Path, tmp_path: Path) -> None:
    colours = [(250, 20, 20), (20, 250, 20), (20, 20, 250), (250, 250, 20), (20, 250, 250)]
    (tmp_path / "frames").mkdir()
    for number, colour in enumerate(colours):
        Image.new("RGB", (112, 84), colour).save(tmp_path / "frames" / f"{number}.png")
    data = rows(tmp_path / "asked.jsonl", {"video": str(tmp_path / "frames"), "question": QUESTION, "answer": "red"})
    options = ("--methods", "random", "--budget", "40%", "--rounds", 1, "--warmup", 0, "--max-new-tokens", 1)
    files = ("--run-dir", tmp_path / "run", "--export", tmp_path / "found.html")
    run("compare", "--model", qwen, "--data", data, *options, *files)
    with Image.open(tmp_path / "run" / "overlays" / "000000-000.webp") as sheet:
        pixels = np.asarray(sheet.convert("RGB"), dtype=int)
    shares = [(np.abs(pixels - colour).sum(-1) < 60).mean() for colour in colours]
    assert min(shares) > 0.1 and max(shares) < 1.2 * min(shares)


def test_rows_without_a_video_that_exists_are_left_out(clip: Path, tmp_path: Path) -> None:
    data = rows(tmp_path / "asked.jsonl", {"video": str(clip), "question": "?"}, {"video": "no.mp4", "question": "?"})
    found = open_dataset(str(data))
    assert len(found.samples) == 1 and found.missing == 1
    for wrong in ({"video": "", "question": "?"}, {"video": [], "question": "?"}, {"video": 3, "question": "?"}):
        with pytest.raises(MMTokError, match="video"):
            open_dataset(str(rows(tmp_path / "wrong.jsonl", wrong)))


def test_bad_options_and_models_are_one_line(tiny_directory: Path, qwen: Path, clip: Path, folder: Path) -> None:
    for budget in (4, 64):  # 64 is more than an image has
        refused(run("infer", clip, QUESTION, "--model", tiny_directory, "--budget", budget), "sees images only")
    whole = ("--model", qwen, "--method", "uniform:frames", "--budget")
    refused(run("infer", clip, QUESTION, *whole, 2), "one slice in time of the video has")
    assert "than the budget" not in run("infer", clip, QUESTION, *whole, "1%").stdout
    refused(run("infer", clip, QUESTION, "--model", qwen, "--frames", 4, "--fps", 2), "--frames and --fps")
    refused(run("prune", folder / "0001.png", QUESTION, "--model", qwen, "--method", "evs"), "an image")
    options = ("--method", "fastv", "--budget-per", "frame", "--budget", "50%")
    refused(run("infer", clip, QUESTION, "--model", qwen, *options), "cannot reduce each frame")
    refused(run("infer", clip, QUESTION, "--model", qwen, "--budget-per", "slice"), "'slice'")


@pytest.mark.parametrize("name", ["llava-onevision-7b", "qwen2.5-vl-7b", "qwen3-vl-8b", "qwen3.5-4b"])
def test_profiles_say_how_many_tokens_a_frame_has(name: str) -> None:
    from mmtok_cli.models import outline
    from mmtok_cli.profiles import known_profiles

    blank = Image.new("RGB", (640, 480))
    model, profile = outline(name, device="cpu", attention="sdpa"), known_profiles()[name]
    for frames in (2, 4, 16):
        video = Video.of((blank,) * frames, tuple(map(float, range(frames))), 1.0)
        assert model.total(video) / frames == profile.frame_tokens
    assert model.total(blank) == profile.vision_tokens


def test_long_videos_have_smaller_frames() -> None:
    """As in qwen-vl-utils: 768 tokens of two frames at most, and 115,200 of a whole video; 128 at least."""
    from mmtok_cli.models import outline

    model, large, small = outline("qwen2.5-vl-7b", device="cpu", attention="sdpa"), (1920, 1080), (64, 64)

    def of_slice(size: tuple[int, int], frames: int) -> float:
        blank = Image.new("RGB", size)
        return model.total(Video.of((blank,) * frames, tuple(map(float, range(frames))), 1.0)) / (frames / 2)

    assert 700 < of_slice(large, 16) <= 768
    assert 350 < of_slice(large, 600) <= 2 * 115_200 / 600
    assert 128 <= of_slice(small, 16) <= 150


def test_the_video_of_the_package_is_what_was_drawn() -> None:
    """Its questions are exact: what they ask about is in the decoded frames."""
    pytest.importorskip("av")
    from mmtok_cli.demo import film
    from mmtok_cli.demo.scenes import COLOURS

    folder = Path(film.__file__).parent
    video = open_video(folder / "example.mp4", Sampling(frames=film.FPS * film.SECONDS))
    drawn = film.frames()
    assert len(video) == len(drawn)
    for decoded, image in zip(video.frames.images, drawn, strict=True):
        difference = np.asarray(decoded, dtype=float) - np.asarray(image, dtype=float)
        assert np.abs(difference).mean() < 6
    samples = open_dataset(str(folder / "example_video.jsonl")).samples
    assert [(s.question, s.answer, s.kind) for s in samples] == [tuple(q) for q in film.QUESTIONS]

    def centre(image: Image.Image, colour: str) -> tuple[float, float] | None:
        close = np.abs(np.asarray(image, dtype=float) - COLOURS[colour]).sum(-1) < 60
        ys, xs = close.nonzero()
        return (xs.mean(), ys.mean()) if len(xs) > 100 else None

    first, middle, last = (video.frames.images[i] for i in (0, len(video) // 2, -1))
    (x0, _), (x1, _) = centre(first, "red"), centre(last, "red")  # type: ignore[misc]
    (_, y0), (_, y1) = centre(first, "blue"), centre(last, "blue")  # type: ignore[misc]
    assert x1 > x0 + 100 and y1 < y0 - 60 and centre(first, "green") == pytest.approx(centre(last, "green"), abs=2)
    assert centre(middle, "yellow") and not centre(first, "yellow") and not centre(last, "yellow")
