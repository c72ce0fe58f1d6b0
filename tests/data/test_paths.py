"""Several image folders, links that are meant, images in base64, and a header read by the way."""

import base64
import os

import pytest

from seecal import load_records
from seecal.data.paths import ImageFolders, MissingImage, RecordError, embedded_image, resolve_inside
from tests.support.sources import png, row, write_json


@pytest.fixture
def disks(tmp_path):
    """A folder of links to two disks, as people lay out LLaVA's images."""
    for disk, name in (("disk1", "coco"), ("disk2", "gqa")):
        (tmp_path / disk / name).mkdir(parents=True)
        (tmp_path / disk / name / f"{name}.png").write_bytes(png())
        (tmp_path / "playground").mkdir(exist_ok=True)
        os.symlink(tmp_path / disk / name, tmp_path / "playground" / name)
    (tmp_path / "secret.png").write_bytes(png())
    return tmp_path


def paths_of(disks, **options):
    rows = [row(image="coco/coco.png"), row(image="gqa/gqa.png")]
    data = load_records(write_json(disks / "playground" / "d.json", rows), **options)
    return [record["images"][0]["path"] for record in data]


def test_several_folders(disks):
    expected = [str(disks / "disk1/coco/coco.png"), str(disks / "disk2/gqa/gqa.png")]
    with pytest.raises(ValueError, match=r"leads out of .*set image_root=... to a folder or a list of .*follow_links"):
        paths_of(disks)
    assert paths_of(disks, image_root=[disks / "disk1", disks / "disk2"]) == expected
    links_into_them = [disks / "playground", disks / "disk1", str(disks / "disk2")]
    assert paths_of(disks, image_root=links_into_them) == expected


def test_links_that_are_meant(disks):
    found = paths_of(disks, follow_links=True)
    assert [os.path.realpath(path) for path in found] == [
        str(disks / "disk1/coco/coco.png"),
        str(disks / "disk2/gqa/gqa.png"),
    ]
    for path in ("../secret.png", "coco/../../secret.png", str(disks / "secret.png"), "/etc/passwd"):
        with pytest.raises(ValueError, match=r"leads out of"):
            load_records([row(image=path)], image_root=disks / "playground", follow_links=True)


def test_the_first_folder_that_has_it_is_taken(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "both.png").write_bytes(png())
    (tmp_path / "b" / "one.png").write_bytes(png())
    folders = ImageFolders((str(tmp_path / "a"), str(tmp_path / "b")))
    assert folders.find("both.png") == str(tmp_path / "a" / "both.png")
    assert folders.find("one.png") == str(tmp_path / "b" / "one.png")
    with pytest.raises(MissingImage, match=r"image 'gone.png' is in none of .*a' and .*b'"):
        folders.find("gone.png")
    with pytest.raises(FileNotFoundError, match=r"image_root='nowhere'"):
        load_records([row()], image_root=[tmp_path, "nowhere"])


@pytest.mark.parametrize("follow_links", [False, True])
@pytest.mark.parametrize("read", [False, True])
def test_a_file_where_another_has_a_folder(tmp_path, read, follow_links):
    for place in ("a/b/one.png", "c/one.png/two.png"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_bytes(png())
    (tmp_path / "file").write_text("")
    roots = [str(tmp_path / name) for name in ("c", "a/b", "file", "a")]
    (tmp_path / "c" / "b").write_text("")
    for several in (roots, roots[::-1]):
        folders = ImageFolders(tuple(several), follow_links)
        assert folders.found("b/one.png", read)[0] == str(tmp_path / "a/b/one.png")
        assert folders.found("one.png/two.png", read)[0] == str(tmp_path / "c/one.png/two.png")
        assert folders.found("one.png", read)[0] == str(tmp_path / "a/b/one.png")
        with pytest.raises(MissingImage, match=r"image 'b/gone.png' is in none of"):
            folders.found("b/gone.png", read)
    with pytest.raises(MissingImage, match=r"image 'b/one.png' is not in .*c'"):
        ImageFolders((roots[0],), follow_links).found("b/one.png", read)


def test_more_folders_than_are_kept_in_mind(tmp_path, monkeypatch):
    monkeypatch.setattr("seecal.data.paths._FOLDERS_KEPT", 2)
    folders = ImageFolders((str(tmp_path),))
    for index in range(5):
        (tmp_path / str(index)).mkdir()
        (tmp_path / str(index) / "a.png").write_bytes(png())
        assert folders.find(f"{index}/a.png") == str(tmp_path / str(index) / "a.png")
        assert len(folders._real) <= 2


def test_the_file_is_opened_once_for_its_header(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png((40, 30)))
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(path) or real(path, *rest))
    load_records([row(image="a.png")], image_root=tmp_path)
    assert [path for path in opened if str(path).endswith("a.png")] == [str(tmp_path / "a.png")]


def test_what_is_no_file_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for read in (False, True):
        with pytest.raises(RecordError, match=r"image 'pipe.png' is not a file"):
            ImageFolders((str(tmp_path),)).found("pipe.png", read)
        with pytest.raises(RecordError, match=r"image 'pipe.png' is not a file"):
            resolve_inside("pipe.png", str(tmp_path))


@pytest.mark.parametrize("form", ["data:image/png;base64,{}", "DATA:;base64,{}", "{}", "data:image/png;base64,\n{}"])
def test_images_in_base64(form):
    file = png((64, 64))
    text = form.format(base64.b64encode(file).decode())
    assert len(text) > 128
    assert embedded_image(text) == file
    rows = [
        row(image=text),
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": text}}]},
                      {"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "url": text}]},
                      {"role": "assistant", "content": "a"}]},
    ]  # fmt: skip
    for one in rows:
        assert load_records([one])[0]["images"] == [{"path": None, "bytes": file}]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("data:image/png;base64,!!!!", "is not valid base64"),
        ("data:text/html,<b>", "is a URL"),
        ("data:image/png;base64,aGVsbG8=", "not an image that Pillow can read"),
        ("/9j/" + "*" * 300, "is not valid base64"),
    ],
)
def test_base64_that_is_no_image(tmp_path, text, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        load_records([row(image=text)], image_root=tmp_path)
    assert len(str(caught.value)) < 400
    assert embedded_image("a.png") is None
