import contextlib
import gzip
import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from fooddiff.data import sources
from fooddiff.data.cache import load_dataset
from fooddiff.data.preprocess import to_pixels
from fooddiff.data.sources import source as limits
from tests.tiny_food101 import jpeg, tiny_food101, write_folder, write_tar

CHEESECAKE = "food-101/images/cheesecake/100.jpg"


def load(path, cache_dir, split="train", **options):
    return load_dataset(sources.archive(path), split, image_size=16, cache_dir=cache_dir, **options)


def packed(tmp_path, **changes):
    members = tiny_food101() | changes.pop("members", {})
    return write_tar(tmp_path / "food-101.tar.gz", members, **changes)


@pytest.fixture(params=["tar.gz", "tar", "folder around", "folder", "images before meta", "dotted names"])
def layout(request, tmp_path):
    members = tiny_food101()
    match request.param:
        case "tar.gz":
            return write_tar(tmp_path / "a.tar.gz", members)
        case "tar":
            return write_tar(tmp_path / "a.tar", members, "w")
        case "folder around":
            return write_folder(tmp_path / "a", members)
        case "folder":
            return write_folder(tmp_path / "a", members) / "food-101"
        case "images before meta":
            return write_tar(tmp_path / "a.tar.gz", dict(reversed(members.items())))
        case "dotted names":
            return write_tar(tmp_path / "a.tar.gz", {f"./{name}": data for name, data in members.items()})


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_layout_gives_the_listed_images_with_the_archives_own_classes(layout, tmp_path, split):
    dataset = load(layout, tmp_path / "cache", split)
    members = tiny_food101()
    listed = json.loads(members[f"food-101/meta/{split}.json"])
    assert dataset.class_names == ("cheesecake", "cheese_plate", "waffles")  # not sorted
    ids = sorted(one for of_class in listed.values() for one in of_class)
    assert dataset.labels.tolist() == [dataset.class_names.index(one.split("/")[0]) for one in ids]
    expected = [to_pixels(Image.open(io.BytesIO(members[f"food-101/images/{one}.jpg"])), 16) for one in ids]
    np.testing.assert_array_equal(dataset.images, expected)
    assert dataset.manifest["images_per_class"][2] == 0


def test_the_identity_is_stable_and_follows_the_content(tmp_path):
    path = packed(tmp_path)
    before = sources.archive(path).identity
    assert sources.archive(path).identity == before
    packed(tmp_path, members={CHEESECAKE: jpeg(99)})
    assert sources.archive(path).identity != before


def test_the_identity_of_a_folder_follows_its_images(tmp_path):
    root = write_folder(tmp_path, tiny_food101())
    before = sources.archive(root).identity
    assert sources.archive(root / "food-101").identity == before
    (root / CHEESECAKE).write_bytes(jpeg(99) + b"\0")
    assert sources.archive(root).identity != before


def test_a_cache_hit_does_not_read_the_archive(tmp_path, monkeypatch):
    path = packed(tmp_path)
    load(path, tmp_path / "cache")
    monkeypatch.setattr(tarfile, "TarFile", None)
    assert len(load(path, tmp_path / "cache").images) == 8


# Malformed input: a clear error, and no cache


def refused(path, tmp_path, message, error=ValueError):
    cache = tmp_path / "cache"
    with pytest.raises(error, match=message):
        load(path, cache)
    assert not cache.exists() or [entry.name for entry in cache.iterdir()] == [".lock"]


def test_no_path(tmp_path):
    refused(None, tmp_path, "needs config.data.path")


def test_a_path_with_nothing_there(tmp_path):
    refused(tmp_path / "absent.tar.gz", tmp_path, "absent.tar.gz does not exist", FileNotFoundError)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"\x1f\x8bhello", gzip.compress(b"hello" * 1000, mtime=0)],
    ids=["empty", "text", "gzip's first bytes", "gzip of no archive"],
)
def test_a_file_that_is_no_archive(tmp_path, content):
    path = tmp_path / "food-101.tar.gz"
    path.write_bytes(content)
    refused(path, tmp_path, "food-101.tar.gz (is not a whole tar|has no food-101/meta)")


@pytest.mark.parametrize("mode", ["w:gz", "w"])
@pytest.mark.parametrize("share", [0.1, 0.4, 0.8, 0.99])
def test_a_truncated_archive(tmp_path, mode, share):
    path = packed(tmp_path, mode=mode)
    size = sum(512 + -(-len(data) // 512) * 512 for data in tiny_food101().values())  # less the tar's padding
    whole = {split: load(path, tmp_path / "whole", split).manifest["sha256"] for split in ("train", "test")}
    os.truncate(path, int(share * min(path.stat().st_size, size)))
    refused = 0
    for split, sha256 in whole.items():
        with contextlib.suppress(ValueError):
            assert load(path, tmp_path / "cache", split).manifest["sha256"] == sha256
            continue
        refused += 1
        with pytest.raises(ValueError, match=r"not a whole tar|incomplete|truncated"):
            load(path, tmp_path / "cache", split)
    assert refused >= 1  # a plain tar has no checksum: a split that lies before the cut is whole


def test_one_flipped_bit_in_a_packed_archive(tmp_path):
    path = packed(tmp_path, mode="w:gz")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1  # within gzip's checksum
    path.write_bytes(content)
    refused(path, tmp_path, "CRC")


def test_another_archive(tmp_path):
    path = write_tar(tmp_path / "other.tar.gz", {"README": b"hello"})
    refused(path, tmp_path, "has no food-101/meta/classes.txt, .*; expected food-101.tar.gz")


def test_a_folder_without_the_layout(tmp_path):
    (tmp_path / "data").mkdir()
    refused(tmp_path / "data", tmp_path, "no folders meta and images")


@pytest.mark.parametrize("pack", [True, False])
def test_missing_images_are_counted_and_named(tmp_path, pack):
    members = tiny_food101()
    for name in ("cheesecake/100", "cheesecake/101", "cheese_plate/103"):
        del members[f"food-101/images/{name}.jpg"]
    path = write_tar(tmp_path / "a.tar", members, "w") if pack else write_folder(tmp_path / "a", members)
    refused(path, tmp_path, "3 images that food-101/meta lists are missing: cheese_plate/103, cheesecake/100, ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.json", b"{", "JSON"),
        ("train.json", b"\xff\xfe", "JSON"),
        ("train.json", b"[" * 100_000, "JSON"),
        ("train.json", b"[]", "form"),
        ("train.json", b"{}", "no images"),
        ("train.json", b'{"cheesecake": "cheesecake/1"}', "form"),
        ("train.json", b'{"cheesecake": [1]}', "expected cheesecake/<name>"),
        ("train.json", b'{"cheesecake": ["waffles/1"]}', "expected cheesecake/<name>"),
        ("train.json", b'{"cheesecake": ["cheesecake/100", "cheesecake/100"]}', "twice"),
        ("train.json", b'{"pizza": ["pizza/1"]}', "lacks: 'pizza'"),
        ("train.json", b'{"cheesecake": ["cheesecake/../../../etc/passwd"]}', "not allowed"),
        ("train.json", b'{"cheesecake": ["cheesecake/\\u001b[2J"]}', r"'\\x1b\[2J' is not allowed"),
        ("classes.txt", b"", "distinct class names, got none"),
        ("classes.txt", b"cheesecake\ncheesecake\n", "cheesecake twice"),
        ("classes.txt", b"cheesecake\n../evil\n", "'../evil' is not allowed"),
        ("classes.txt", b"cheesecake\n..\n", "not allowed"),
        ("classes.txt", b"cheesecake\n/etc\n", "not allowed"),
        ("classes.txt", b"cheesecake\n\x1b]0;owned\x07\n", r"'\\x1b\]0;owned\\x07' is not allowed"),
        ("classes.txt", "cheesecake\n\u202egnp\n".encode(), r"u202e.* is not allowed"),
    ],
)
@pytest.mark.parametrize("pack", [True, False])
def test_malformed_lists(tmp_path, pack, name, content, message):
    members = tiny_food101() | {f"food-101/meta/{name}": content}
    path = write_tar(tmp_path / "a.tar", members, "w") if pack else write_folder(tmp_path / "a", members)
    refused(path, tmp_path, message)


# Unreadable and hostile members


def info(name, kind, link=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


def test_a_corrupt_image_is_named(tmp_path):
    refused(packed(tmp_path, members={CHEESECAKE: b"not an image"}), tmp_path, "cheesecake/100: not a JPEG")


def test_a_truncated_image_is_named(tmp_path):
    whole = tiny_food101()[CHEESECAKE]
    refused(
        packed(tmp_path, members={CHEESECAKE: whole[: len(whole) // 2]}),
        tmp_path,
        "cheesecake/100: not a whole JPEG, PNG, WEBP image .*[Tt]runcated",
    )


def test_a_format_that_is_not_expected_is_not_even_tried(tmp_path):
    postscript = io.BytesIO()
    Image.new("RGB", (8, 8)).save(postscript, "EPS")
    refused(packed(tmp_path, members={CHEESECAKE: postscript.getvalue()}), tmp_path, "not a JPEG")


def test_a_picture_that_would_fill_the_memory_is_not_decoded(tmp_path):
    bomb = io.BytesIO()
    Image.new("1", (8000, 8000)).save(bomb, "PNG")
    assert len(bomb.getvalue()) < 100_000
    refused(packed(tmp_path, members={CHEESECAKE: bomb.getvalue()}), tmp_path, "8000 x 8000 is more than")


def test_a_member_that_unpacks_to_too_much_is_not_read_whole(tmp_path):
    bomb = bytes(limits.MAX_FILE_BYTES + 1)
    refused(packed(tmp_path, members={CHEESECAKE: bomb}), tmp_path, "cheesecake/100: .* more than 33,554,432")


def test_a_header_that_claims_too_much_is_not_believed(tmp_path):
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 10**10
    path = packed(tmp_path)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in tiny_food101().items():
            if name == CHEESECAKE:
                tar.fileobj.write(header.tobuf(tarfile.GNU_FORMAT))
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    refused(path, tmp_path, "a header claims 10,000,000,")


def test_nothing_is_extracted_and_links_are_not_followed(tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(jpeg(7))
    members = {
        "../escaped.txt": b"out",
        str(tmp_path / "absolute.txt"): b"out",
        CHEESECAKE: info(CHEESECAKE, tarfile.SYMTYPE, str(secret)),
        "food-101/images/cheesecake/101.jpg": info(
            "food-101/images/cheesecake/101.jpg", tarfile.LNKTYPE, "food-101/images/cheesecake/102.jpg"
        ),
        "food-101/images/cheesecake/102.jpg": info("food-101/images/cheesecake/102.jpg", tarfile.CHRTYPE),
    }
    path = packed(tmp_path, members=members)
    refused(path, tmp_path, "3 images that food-101/meta lists are missing: cheesecake/100, cheesecake/101")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cache", "food-101.tar.gz", "secret.jpg"]


def test_a_member_that_comes_twice_is_refused(tmp_path):
    members = tiny_food101()
    path = write_tar(tmp_path / "a.tar", members | {f"./{CHEESECAKE}": jpeg(50)}, "w")
    refused(path, tmp_path, "holds food-101/images/cheesecake/100.jpg twice")


def test_files_that_are_not_listed_do_not_matter(tmp_path):
    extra = {"food-101/.DS_Store": b"x", "food-101/images/cheesecake/._100.jpg": b"x", "food-101/README": b""}
    dataset = load(packed(tmp_path, members=extra), tmp_path / "cache")
    assert len(dataset.images) == 8


def rotated_exif():
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to view", which is ignored
    return exif


@pytest.mark.parametrize("options", [{"mode": "L"}, {"mode": "CMYK"}, {"exif": rotated_exif()}])
def test_grey_cmyk_and_exif_photographs(tmp_path, options):
    content = jpeg(3, (16, 16), **options)
    dataset = load(packed(tmp_path, members={CHEESECAKE: content}), tmp_path / "cache")
    first_cheesecake = dataset.labels.tolist().index(0)
    np.testing.assert_array_equal(
        dataset.images[first_cheesecake], np.array(Image.open(io.BytesIO(content)).convert("RGB"))
    )
