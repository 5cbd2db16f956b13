//! The format of `cuda/kernels.list`, for `build.rs` and for the tests.

/// A line of the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operation {
    /// Of the file `cuda/<name>.cu`.
    pub name: String,
    /// PTX targets such as `80` or `90a`, oldest first.
    pub targets: Vec<String>,
    /// The names of its kernels.
    pub entries: Vec<String>,
}

/// The operations of a list; the error says which line is wrong.
pub fn parse(text: &str) -> Result<Vec<Operation>, String> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| {
            let fields: Vec<&str> = line.split('|').map(str::trim).collect();
            let [name, targets, entries] = fields[..] else {
                return Err(format!("kernels.list: got {line:?}, expected operation | targets | entries"));
            };
            let targets: Vec<String> = targets.split_whitespace().map(str::to_owned).collect();
            let entries: Vec<String> = entries.split_whitespace().flat_map(expand).collect();
            if targets.is_empty() || entries.is_empty() {
                return Err(format!("kernels.list: got {line:?}, expected a target and an entry at least"));
            }
            Ok(Operation { name: name.to_owned(), targets, entries })
        })
        .collect()
}

/// `a_{b,c}` as `a_b` and `a_c`, for every pair of braces.
fn expand(word: &str) -> Vec<String> {
    let Some((head, rest)) = word.split_once('{') else { return vec![word.to_owned()] };
    let Some((choices, tail)) = rest.split_once('}') else { return vec![word.to_owned()] };
    choices.split(',').flat_map(|choice| expand(&format!("{head}{choice}{tail}"))).collect()
}

/// The compute capability of a target, ten times the major version plus the minor one: 90 for `90a`.
pub fn number(target: &str) -> Result<u32, String> {
    let digits = target.trim_end_matches(|c: char| c.is_ascii_lowercase());
    digits.parse().map_err(|_| format!("got the CUDA target {target:?}, expected one such as 80 or 90a"))
}
