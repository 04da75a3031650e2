"""What an installation has of C++ libraries: their headers, and one archive."""

load("@bazel_tools//tools/cpp:toolchain_utils.bzl", "find_cpp_toolchain")

def _cc_header_list_impl(ctx):
    contexts = [dep[CcInfo].compilation_context.headers for dep in ctx.attr.deps]
    headers = [file for file in depset(transitive = contexts).to_list() if not file.owner.workspace_name]
    ctx.actions.write(ctx.outputs.out, "".join([path + "\n" for path in sorted([file.short_path for file in headers])]))
    return DefaultInfo(
        files = depset([ctx.outputs.out]),
        runfiles = ctx.runfiles(files = [ctx.outputs.out] + headers),
    )

# `out` names, line by line, the headers of `deps` and of all that they depend on in this workspace. The headers come
# along as runfiles.
cc_header_list = rule(
    implementation = _cc_header_list_impl,
    attrs = {
        "deps": attr.label_list(mandatory = True, providers = [CcInfo]),
        "out": attr.output(mandatory = True),
    },
)

def _single_object_archive_impl(ctx):
    toolchain = find_cpp_toolchain(ctx)
    libraries = []
    for dep in ctx.attr.deps:
        for linker_input in dep[CcInfo].linking_context.linker_inputs.to_list():
            for library in linker_input.libraries:
                libraries.append(library.pic_static_library or library.static_library)
    libraries = depset([library for library in libraries if library]).to_list()
    object = ctx.actions.declare_file(ctx.label.name + ".o")
    ctx.actions.run(
        outputs = [object],
        inputs = depset(libraries, transitive = [toolchain.all_files]),
        executable = toolchain.ld_executable,
        arguments = ["-r", "-o", object.path, "--whole-archive"] + [library.path for library in libraries],
        mnemonic = "LinkObject",
    )
    ctx.actions.run(
        outputs = [ctx.outputs.out],
        inputs = depset([object], transitive = [toolchain.all_files]),
        executable = toolchain.ar_executable,
        arguments = ["rcsD", ctx.outputs.out.path, object.path],
        mnemonic = "ArchiveObject",
    )
    return DefaultInfo(files = depset([ctx.outputs.out]), runfiles = ctx.runfiles(files = [ctx.outputs.out]))

# An archive with all of `deps`, and of what they depend on, in one object: whoever needs any symbol of it, such as
# malloc, gets all of it, what runs at the start of the process too.
single_object_archive = rule(
    implementation = _single_object_archive_impl,
    attrs = {
        "deps": attr.label_list(mandatory = True, providers = [CcInfo]),
        "out": attr.output(mandatory = True),
        "_cc_toolchain": attr.label(default = "@bazel_tools//tools/cpp:current_cc_toolchain"),
    },
    toolchains = ["@bazel_tools//tools/cpp:toolchain_type"],
)
