"""One C++ toolchain per compiler, so that both live in one workspace without re-configuring each other."""

load("@bazel_tools//tools/cpp:lib_cc_configure.bzl", "get_cpu_value")
load("@bazel_tools//tools/cpp:unix_cc_configure.bzl", "configure_unix_toolchain")

def _system_compiler_impl(repository_ctx):
    compiler = repository_ctx.attr.compiler
    if not repository_ctx.path(compiler).exists:
        fail("\nMissing package: %s (no %s). Run third_party/install_packages, or apt-get install %s.\n" % (
            repository_ctx.attr.package,
            compiler,
            repository_ctx.attr.package,
        ))
    configure_unix_toolchain(
        repository_ctx,
        get_cpu_value(repository_ctx),
        overriden_tools = {"gcc": compiler},
    )

# Provides `:toolchain`, for --crosstool_top. The environment's CC is not looked at.
system_compiler = repository_rule(
    implementation = _system_compiler_impl,
    attrs = {
        "compiler": attr.string(mandatory = True, doc = "Absolute path of the driver."),
        "package": attr.string(mandatory = True, doc = "The Debian package that holds it."),
    },
    configure = True,
    local = True,
)
