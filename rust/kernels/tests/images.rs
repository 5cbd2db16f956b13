//! What is in the images. Passes, having checked nothing but the list, where they were not built.

use lowbit_kernels::{IMAGES, image, list};

/// The PTX instruction set that drivers of the 580 series, the oldest supported ones, take: CUDA 13.0's.
const PTX_VERSION: &str = "9.0";

fn lines(bytes: &[u8]) -> impl Iterator<Item = &str> {
    bytes.split(|&byte| byte == b'\n' || byte == 0).filter_map(|line| std::str::from_utf8(line).ok())
}

#[test]
fn every_target_of_every_image_has_every_entry() {
    for image in IMAGES {
        for entry in image.entries {
            let marker = format!(".visible .entry {entry}(");
            let found = lines(image.bytes).filter(|line| line.trim() == marker).count();
            assert_eq!(found, image.ptx_targets, "{entry} in {}", image.name);
        }
    }
}

#[test]
fn every_entry_of_an_image_is_listed() {
    for image in IMAGES {
        for line in lines(image.bytes) {
            if let Some(entry) = line.trim().strip_prefix(".visible .entry ").and_then(|rest| rest.strip_suffix('(')) {
                assert!(image.entries.contains(&entry), "{entry} of {} stands in no line of kernels.list", image.name);
            }
        }
    }
}

#[test]
fn the_oldest_driver_takes_the_ptx() {
    for image in IMAGES {
        let versions: Vec<&str> = lines(image.bytes).filter_map(|line| line.strip_prefix(".version ")).collect();
        assert_eq!(versions, vec![PTX_VERSION; image.ptx_targets], "{}", image.name);
    }
}

#[test]
fn the_list_names_the_images() {
    let text = include_str!("../../../cuda/kernels.list");
    let operations = list::parse(text).expect("the list that was built from");
    if !IMAGES.is_empty() {
        let names: Vec<&str> = operations.iter().map(|operation| operation.name.as_str()).collect();
        assert_eq!(IMAGES.iter().map(|image| image.name).collect::<Vec<_>>(), names);
        assert!(names.iter().all(|name| image(name).is_some()));
    }
    assert!(image("no such operation").is_none());
}

#[test]
fn braces_are_expanded() {
    let text = "# comment\n\n a | 75 90a | x_{b,c}_{1,2} y ";
    let operations = list::parse(text).expect("well formed");
    assert_eq!(operations[0].entries, ["x_b_1", "x_b_2", "x_c_1", "x_c_2", "y"]);
    assert_eq!(operations[0].targets, ["75", "90a"]);
    assert_eq!(list::number("90a"), Ok(90));
}

#[test]
fn wrong_lines_are_named() {
    for text in ["a | 75", "a | | x", "a | 75 |"] {
        assert!(list::parse(text).is_err_and(|error| error.contains(text)), "{text}");
    }
    assert!(list::number("sm_x").is_err_and(|error| error.contains("sm_x")));
}
