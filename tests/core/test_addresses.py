"""Addresses are worded without what grants access to them, and stay as they are otherwise."""

from __future__ import annotations

import time

import pytest

from distill.core.addresses import public

SIGNED = "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIA0123%2Fx&X-Amz-Signature=deadbeef"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:pass@host/x.tar", "https://host/x.tar"),
        ("https://me@host:8080/x.tar", "https://host:8080/x.tar"),
        ("https://me:p@ss@host/x.tar", "https://host/x.tar"),
        ("s3://AKIA:ab/c+d/e@bucket/x.tar", "s3://bucket/x.tar"),
        (f"https://host/x.tar?{SIGNED}", "https://host/x.tar"),
        (f"https://host/x.tar?versionId=7&{SIGNED}", "https://host/x.tar?versionId=7"),
        (f"https://host/x.tar?{SIGNED}&part=2#top", "https://host/x.tar?part=2#top"),
        ("https://a.blob/x.tar?sv=2020&se=2026&sr=b&sp=r&sig=ab%3D", "https://a.blob/x.tar"),
        ("https://cdn/x.tar?Expires=1&Signature=a~_&Key-Pair-Id=K", "https://cdn/x.tar"),
        ("https://h/x.tar?token=hf_abc", "https://h/x.tar"),
        ("https://h/x#access_token=abc", "https://h/x"),
        ("a URL('https://u:p@h/x?sig=1'), then 'ftp://u:p@h/y'", "a URL('https://h/x'), then 'ftp://h/y'"),
        ("https://u:p@h/x?token=1: cannot be reached", "https://h/x: cannot be reached"),
        ("hf_ABCDEFGHIJKLMNOPQRSTUVWX is refused", "hf_... is refused"),
        (f"github_pat_{'a1B2' * 5}ab_{'c3D4' * 14}xyz", "github_pat_..."),
        ("sftp://me:pass@host/x.tar", "sftp://host/x.tar"),
        ("zip://a@b/x.png::https://u:p@h/x.zip?sig=1", "zip://a@b/x.png::https://h/x.zip"),
        (f"https://h/x.tar?key={'aB3' * 12}&session={'aB3' * 12}", "https://h/x.tar"),
    ],
)
def test_what_grants_access_is_left_out(text, expected):
    assert public(text) == expected
    assert public(public(text)) == public(text)


@pytest.mark.parametrize(
    "text",
    [
        *("https://host/x.tar", "https://host:8080/a@b/x.tar", "https://[::1]:80/a@b", "s3://bucket/a@b/c.tar"),
        *("hf://datasets/org/name@v1/x.tar", "file://C:/a@b/x", "org/name@main", "a?token=1", "me@host", ""),
        *("https://host/get?id=5&file=a.tar", "https://host/get?key=a/b.tar", "https://h/x?page=2&sort=size#end"),
        *("abfs://photos@account.dfs.core.windows.net/x.tar", "oci://bucket@space/x.tar", "sftp://me@host:22/x.tar"),
        *("github://org:repo@main/x.tar", "memory://a@b/x.tar", "zip://a@b/x.png::/data/x.zip"),
        *("https://h/get?session=2024-05-01&key=scene_07", "https://h/x?design=3&tokens=4&unsigned=1&monkey_id=3"),
        *("/data/hf_depth_anything_v2_large/x", "hf_indoor_scenes_of_Berlin_000.tar", "hf_indoorscenesofeverywhere"),
        *("memory://photos/sa_{0..1}.tar", "?sig=1", "https://h/d?sv=1&st=2", "hf_hub_download", "https://h/x?"),
    ],
)
def test_other_text_stays(text):
    assert public(text) == text


def test_tables_are_worded_within_and_long_texts_take_no_time():
    assert public({"a": ["https://u:p@h/x", 1, None], "b": ("x",)}) == {"a": ["https://h/x", 1, None], "b": ["x"]}
    start = time.perf_counter()
    for text in (
        "://" * 50_000,
        "a://" + "@" * 200_000,
        "a" * 200_000 + "://",
        "a://x?" + "&a=" * 60_000,
        "?=" * 99_999,
    ):
        public(text)
        public("b://" + text)
    assert time.perf_counter() - start < 5
