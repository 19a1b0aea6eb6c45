//! Writes the agent's messages from the `.proto` files below `pykata`. With `--check` it only compares and fails on a
//! difference.

use std::path::Path;

/// Definition, the generator's name for its package, and where the code goes.
const MODULES: [(&str, &str, &str); 2] = [
    ("pykata/agent/v1/agent.proto", "pykata.agent.v1.rs", "../src/proto.rs"),
    ("pykata/files/v1/files.proto", "pykata.files.v1.rs", "../src/files/proto.rs"),
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = here.join("../../..").canonicalize()?;
    let out = std::env::temp_dir().join(format!("pykata-codegen-{}", std::process::id()));
    std::fs::create_dir_all(&out)?;
    let mut stale = Vec::new();
    for (definition, name, target) in MODULES {
        let files = protox::compile([definition], [&root])?;
        tonic_prost_build::configure()
            .bytes(".")
            .build_transport(false)
            .client_mod_attribute(".", "#[cfg(any(test, feature = \"client\"))]")
            .out_dir(&out)
            .compile_fds(files)?;
        let code = std::fs::read_to_string(out.join(name))?;
        let target = here.join(target);
        if !std::env::args().any(|a| a == "--check") {
            std::fs::write(target, code)?;
        } else if std::fs::read_to_string(&target)? != code {
            stale.push(definition);
        }
    }
    std::fs::remove_dir_all(&out)?;
    match stale.is_empty() {
        true => Ok(()),
        false => Err(format!("stale: {stale:?}: run the code generator").into()),
    }
}
