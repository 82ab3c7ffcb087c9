"""Dataset URIs that lead where no job may look, and how each is refused."""

from __future__ import annotations

# Loopback, link-local, metadata and private addresses, in every spelling that some resolver reads.
PRIVATE = [
    "https://127.0.0.1/x", "https://127.1/x", "https://0x7f000001/x", "https://2130706433/x", "https://0177.0.0.1/x",
    "https://0/x", "https://0.0.0.0/x", "https://10.1.2.3/x", "https://172.16.0.1/x", "https://192.168.1.1/x",
    "https://169.254.169.254/latest/meta-data", "https://100.64.0.1/x", "https://224.0.0.1/x", "https://255.255.255.255/x",
    "https://[::1]/x", "https://[::]/x", "https://[::ffff:127.0.0.1]/x", "https://[::ffff:a9fe:a9fe]/x",
    "https://[fe80::1]/x", "https://[fe80::1%25eth0]/x", "https://[fc00::1]/x", "https://[fd00:ec2::254]/x",
    "https://[64:ff9b::7f00:1]/x", "https://[2002:7f00:1::]/x", "https://localhost/x", "https://LOCALHOST./x",
    "https://a.localhost/x", "https://192.0.2.1/x", "https://198.18.0.1/x", "https://240.0.0.1/x",
]  # fmt: skip

# What is refused for another reason, with the code of the error. The only readable bucket is `data`.
FORBIDDEN = [
        ("ftp://host/x", "dataset_scheme"), ("http://host/x", "dataset_scheme"), ("gopher://x", "dataset_scheme"),
        ("s3://artifacts/t/job/a1/adapter.tar.gz", "bucket_forbidden"), ("s3://other/x", "bucket_forbidden"),
        ("s3://data", "dataset_uri"), ("s3://data/", "dataset_uri"), ("s3://data/../artifacts/x", "dataset_uri"),
        ("s3://data/a/../../artifacts/x", "dataset_uri"), ("s3://data/./x", "dataset_uri"),
        ("s3://data/a\\..\\..\\x", "dataset_uri"), ("s3://data/a/..", "dataset_uri"),
        ("s3://data/" + "é" * 600, "dataset_uri"), ("dataset:", "dataset_not_found"),
        ("dataset:../x", "dataset_not_found"), ("dataset:ds_A", "dataset_not_found"), ("hf://one", "dataset_uri"),
        ("hf://a/../b", "dataset_uri"), ("hf://a/b/../../c", "dataset_uri"), ("https://", "dataset_uri"),
        ("https://user:secret@host/x", "dataset_credentials"), ("https://host:99999/x", "dataset_uri"),
        ("https://[::1/x", "dataset_uri"), ("https://999.1.1.1/x", "dataset_uri"),
        ("file:///etc/passwd", "file_forbidden"), ("file://host/etc/passwd", "file_forbidden"),
]  # fmt: skip

# Taken apart differently by different readers, or by none.
TRICKS = [
    "https://127.0.0.1#@example.org/x", "https://example.org@127.0.0.1/x", "https://127.0.0.1%2f@example.org/x",
    "https://127.0.0.1\\@example.org/x", "https://[::ffff:7f00:1]/x", "https://0x7f.1/x", "https://017700000001/x",
    "https://127.0.0.1./x", "https://1.0.0.127.in-addr.arpa:0/x", "https://①②⑦.⓪.⓪.①/x", "https://127。0。0。1/x",
    "HTTPS://127.0.0.1/x", "https:127.0.0.1/x", "https:///127.0.0.1/x", "https:/\\127.0.0.1/x",
    "https://metadata.google.internal./x\r\nHost: example.org", "https://example.org/x\ny", "https://exa mple.org/x",
    "https://example.org\x00.evil/x", "https://[fe80::1%25lo]/x", "https://[::127.0.0.1]/x", "https://[0:0:0:0:0:0:0:1]/x",
    "https://192.88.99.1/x", "https://0300.0250.1.1/x", "https://3232235777/x", "https://10.1/x",
    "s3://data/../artifacts/x\x00", "s3://artifacts/../data/x", "s3://DATA/x", "s3:///x", "s3:data/x", "s3://data@artifacts/x",
    "file:///../etc/passwd", "file:////etc/passwd", "file:///%2e%2e/%2e%2e/etc/passwd", "file://localhost/etc/passwd",
    "file:///proc/self/environ", "file:/etc/passwd", "hf://../../etc", "hf://a/b@../x", "hf://a/b/../../../x",
    "hf://a/b@main/../../x", "dataset:ds_0/../x", "dataset:DS_0", "jar:https://example.org!/x", "data:text/plain,x",
    "s3a://data/x", "hdfs://x/y", "simplecache::s3://data/x", "zip://x::https://example.org/y", "github://a:b@main/x",
    "", " ", "//example.org/x", "example.org/x", "/etc/passwd", "C:\\x", "https://", "x" * 3000,
]  # fmt: skip
