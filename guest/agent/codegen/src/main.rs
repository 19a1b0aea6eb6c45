//! Writes `../src/proto.rs` from `pykata/agent/v1/agent.proto`. With `--check` it only compares and fails on a difference.

use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = here.join("../../..").canonicalize()?;
    let target = here.join("../src/proto.rs");
    let out = std::env::temp_dir().join(format!("pykata-codegen-{}", std::process::id()));
    std::fs::create_dir_all(&out)?;

    let files = protox::compile(["pykata/agent/v1/agent.proto"], [&root])?;
    tonic_prost_build::configure()
        .bytes(".")
        .build_transport(false)
        .client_mod_attribute(".", "#[cfg(any(test, feature = \"client\"))]")
        .out_dir(&out)
        .compile_fds(files)?;
    let code = std::fs::read_to_string(out.join("pykata.agent.v1.rs"))?;
    std::fs::remove_dir_all(&out)?;

    if std::env::args().any(|a| a == "--check") {
        if std::fs::read_to_string(&target)? != code {
            return Err("src/proto.rs is not what agent.proto gives: run the code generator".into());
        }
        return Ok(());
    }
    std::fs::write(target, code)?;
    Ok(())
}
