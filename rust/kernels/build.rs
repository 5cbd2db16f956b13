//! Compiles `cuda/*.cu` as `cuda/kernels.list` says and writes the table that `lib.rs` includes.
//!
//! - `LOWBIT_CUDA`: `1` compiles (the default on Linux), `0` makes a crate without images (the default elsewhere).
//! - `LOWBIT_NVCC`: the compiler. Otherwise it is that of the pip packages of `$PYO3_PYTHON` or `python3`, or of `PATH`.
//! - `LOWBIT_CUDA_ARCHS`: compute capabilities such as `80 90a` that machine code is added for, beside the PTX.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

#[path = "src/list.rs"]
#[allow(unreachable_pub)] // the module is public in the crate
mod list;

use list::Operation;

/// The compiler that is pinned in `pyproject.toml`; another major version makes PTX that our oldest driver refuses.
const NVCC_RELEASE: &str = "13.0";

fn main() {
    if let Err(message) = run() {
        println!("cargo::error={}", message.replace('\n', " "));
    }
}

fn run() -> Result<(), String> {
    let root = PathBuf::from(variable("CARGO_MANIFEST_DIR")).join("../../cuda");
    let out = PathBuf::from(variable("OUT_DIR"));
    for name in ["LOWBIT_CUDA", "LOWBIT_NVCC", "LOWBIT_CUDA_ARCHS", "PYO3_PYTHON"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    println!("cargo::rerun-if-changed={}", root.display());

    let mut table = String::from("&[\n");
    if is_wanted()? {
        let operations = list::parse(&read(&root.join("kernels.list"))?)?;
        let nvcc = find_nvcc()?;
        let archs = env::var("LOWBIT_CUDA_ARCHS").unwrap_or_default();
        let archs: Vec<&str> = archs.split_whitespace().collect();
        let images = compile_all(&nvcc, &root, &out, &operations, &archs)?;
        for (operation, image) in operations.iter().zip(&images) {
            let image = image.display().to_string();
            let Operation { name, targets, entries } = operation;
            writeln!(
                table,
                "Image {{ name: {name:?}, oldest: {}, ptx_targets: {}, entries: &{entries:?}, bytes: include_bytes!({image:?}) }},",
                list::number(&targets[0])?,
                targets.len(),
            )
            .expect("a String takes all");
        }
    }
    table.push(']');
    fs::write(out.join("images.rs"), table).map_err(|error| format!("images.rs: {error}"))
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"))
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}

fn is_wanted() -> Result<bool, String> {
    match env::var("LOWBIT_CUDA").as_deref() {
        Ok("0") => Ok(false),
        Ok("1") => Ok(true),
        Ok("") | Err(_) => Ok(variable("CARGO_CFG_TARGET_OS") == "linux"),
        Ok(other) => Err(format!("LOWBIT_CUDA: got {other:?}, expected 0 (no CUDA kernels) or 1")),
    }
}

/// The pinned compiler, wherever it is; an error says what to do where it is nowhere.
fn find_nvcc() -> Result<PathBuf, String> {
    let nvcc = match env::var_os("LOWBIT_NVCC").filter(|path| !path.is_empty()) {
        Some(path) => PathBuf::from(path),
        None => of_python().or_else(of_path).ok_or(
            "no CUDA compiler: `pip install 'cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]==13.0.2'` into the environment of \
             $PYO3_PYTHON or python3, or set LOWBIT_NVCC to the path of an nvcc 13.0, or LOWBIT_CUDA=0 to build without \
             CUDA kernels",
        )?,
    };
    let output = Command::new(&nvcc).arg("--version").output();
    let output = output.map_err(|error| format!("LOWBIT_NVCC: {}: {error}", nvcc.display()))?;
    let version = String::from_utf8_lossy(&output.stdout).into_owned();
    if version.contains(&format!("release {NVCC_RELEASE},")) {
        return Ok(nvcc);
    }
    let release = version.lines().find(|line| line.contains("release")).unwrap_or("no version").to_owned();
    Err(format!(
        "{}: got {release:?}, expected release {NVCC_RELEASE}: its PTX is what the oldest supported driver takes; \
         `pip install 'cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]==13.0.2'` and set LOWBIT_NVCC to it",
        nvcc.display()
    ))
}

/// `nvidia/cu13/bin/nvcc` in the environment of the Python that the extension is built for.
fn of_python() -> Option<PathBuf> {
    let python = env::var_os("PYO3_PYTHON").unwrap_or_else(|| "python3".into());
    let code = "import nvidia.cu13; print(*nvidia.cu13.__path__, sep='\\n')";
    let output = Command::new(python).args(["-c", code]).output().ok()?;
    let folders = String::from_utf8(output.stdout).ok()?;
    folders.lines().map(|folder| Path::new(folder).join("bin/nvcc")).find(|path| path.is_file())
}

fn of_path() -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?).map(|folder| folder.join("nvcc")).find(|path| path.is_file())
}

/// Every image, compiled side by side: one process an operation, as many at a time as cargo allows.
fn compile_all(
    nvcc: &Path,
    root: &Path,
    out: &Path,
    operations: &[Operation],
    archs: &[&str],
) -> Result<Vec<PathBuf>, String> {
    let images: Vec<PathBuf> =
        operations.iter().map(|operation| out.join(format!("{}.fatbin", operation.name))).collect();
    let jobs: usize = variable("NUM_JOBS").parse().unwrap_or(1);
    let mut failures = Vec::new();
    let work: Vec<_> = operations.iter().zip(&images).collect();
    for batch in work.chunks(jobs.max(1)) {
        let results = std::thread::scope(|scope| {
            let threads: Vec<_> = batch
                .iter()
                .map(|(operation, image)| scope.spawn(|| compile(nvcc, root, operation, archs, image)))
                .collect();
            threads.into_iter().map(|thread| thread.join().expect("compile does not panic")).collect::<Vec<_>>()
        });
        failures.extend(results.into_iter().filter_map(Result::err));
    }
    if failures.is_empty() { Ok(images) } else { Err(failures.join("; ")) }
}

fn compile(nvcc: &Path, root: &Path, operation: &Operation, archs: &[&str], image: &Path) -> Result<(), String> {
    let mut command = Command::new(nvcc);
    // Uncompressed, so that a test can read what is inside; a wheel is a compressed file anyway.
    command.args(["-std=c++17", "-O3", "-fatbin", "--no-compress"]);
    command.arg("-I").arg(root.join("include"));
    for target in &operation.targets {
        command.arg(format!("-gencode=arch=compute_{target},code=compute_{target}"));
    }
    let oldest = list::number(&operation.targets[0])?;
    for arch in archs {
        // A target such as 90a is for that one architecture, others are for what is newer as well.
        let is_served = match operation.targets[0].strip_suffix('a') {
            Some(own) => arch.trim_end_matches('a') == own,
            None => list::number(arch)? >= oldest,
        };
        if is_served {
            let arch = if operation.targets[0].ends_with('a') { &operation.targets[0] } else { *arch };
            command.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
        }
    }
    command.arg("-o").arg(image).arg(root.join(format!("{}.cu", operation.name)));
    let output = command.output().map_err(|error| format!("{}: {error}", nvcc.display()))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    Err(format!("nvcc could not compile cuda/{}.cu: {said}", operation.name))
}
