"""Libraries that come from Debian packages, one repository each.

Their headers lie in the compiler's own include path, so a target here is a BUILD file that adds link
options, after a check that the package is installed.
"""

_LIBRARY_DIRECTORIES = ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib"]

def _find_library(repository_ctx, name):
    """The absolute path of library file `name`, or None."""
    for directory in _LIBRARY_DIRECTORIES:
        path = repository_ctx.path(directory + "/" + name)
        if path.exists:
            return str(path)
    return None

def _fail_missing(repository_ctx, package, file):
    fail("\nMissing package: %s (no %s, for @%s). Run third_party/install_packages, or apt-get install %s.\n" % (
        package,
        file,
        repository_ctx.name,
        package,
    ))

def _system_library_impl(repository_ctx):
    for header in repository_ctx.attr.headers:
        if not repository_ctx.path("/usr/include/" + header).exists:
            _fail_missing(repository_ctx, repository_ctx.attr.package, "/usr/include/" + header)
    substitutions = {}
    for name in repository_ctx.attr.libraries:
        path = _find_library(repository_ctx, name)
        if path == None:
            _fail_missing(repository_ctx, repository_ctx.attr.package, name)
        substitutions["{%s}" % name] = path
    repository_ctx.template("BUILD.bazel", repository_ctx.attr.build_file, substitutions)

# `build_file` becomes the repository's BUILD file; `{libx.so}` in it, for a library named in `libraries`,
# stands for that file's absolute path.
_system_library = repository_rule(
    implementation = _system_library_impl,
    attrs = {
        "build_file": attr.label(mandatory = True, allow_single_file = True),
        "headers": attr.string_list(doc = "Must exist below /usr/include."),
        "libraries": attr.string_list(doc = "Must exist in the system's library directory."),
        "package": attr.string(mandatory = True, doc = "The Debian package that holds them."),
    },
    local = True,
)

def system_libraries():
    """Declares every system library that Freehold, its tests and its benchmarks use."""
    _system_library(
        name = "absl",
        build_file = "//third_party:absl.BUILD",
        headers = ["absl/base/thread_annotations.h", "absl/status/status.h"],
        libraries = ["libabsl_status.a", "libabsl_flags_parse.a"],
        package = "libabsl-dev",
    )
    _system_library(
        name = "gtest",
        build_file = "//third_party:gtest.BUILD",
        headers = ["gtest/gtest.h"],
        libraries = ["libgtest.a", "libgtest_main.a"],
        package = "libgtest-dev",
    )
    _system_library(
        name = "gmock",
        build_file = "//third_party:gmock.BUILD",
        headers = ["gmock/gmock.h"],
        libraries = ["libgmock.a", "libgmock_main.a"],
        package = "libgmock-dev",
    )
    _system_library(
        name = "benchmark",
        build_file = "//third_party:benchmark.BUILD",
        headers = ["benchmark/benchmark.h"],
        libraries = ["libbenchmark.so", "libbenchmark_main.a"],
        package = "libbenchmark-dev",
    )
    _system_library(
        name = "json",
        build_file = "//third_party:json.BUILD",
        headers = ["nlohmann/json.hpp"],
        package = "nlohmann-json3-dev",
    )
    _system_library(
        name = "lz4",
        build_file = "//third_party:lz4.BUILD",
        headers = ["lz4.h"],
        libraries = ["liblz4.a"],
        package = "liblz4-dev",
    )
    _system_library(
        name = "mimalloc",
        build_file = "//third_party:mimalloc.BUILD",
        headers = ["mimalloc.h"],
        libraries = ["libmimalloc.so.2"],
        package = "libmimalloc-dev",
    )
    _system_library(
        name = "jemalloc",
        build_file = "//third_party:jemalloc.BUILD",
        headers = ["jemalloc/jemalloc.h"],
        libraries = ["libjemalloc.so.2"],
        package = "libjemalloc-dev",
    )
    _system_library(
        name = "tcmalloc",
        build_file = "//third_party:tcmalloc.BUILD",
        headers = ["gperftools/tcmalloc.h"],
        libraries = ["libtcmalloc_minimal.so.4"],
        package = "libgoogle-perftools-dev",
    )
