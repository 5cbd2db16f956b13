//! `lowbit_rs._native`: converts arguments, releases the interpreter, maps errors. No logic lives here.

#![allow(clippy::needless_pass_by_value)] // PyO3 hands arguments over by value

use pyo3::prelude::*;

mod buffers;
mod calls;
mod codebooks;
mod cuda;
mod errors;
mod exchange;
mod norms;
mod operations;
mod spec;
mod torch;
mod weight;

/// The extension module.
#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    errors::register(module)?;
    codebooks::register(module)?;
    module.add_class::<spec::PySpec>()?;
    module.add_class::<spec::PyLayout>()?;
    module.add_class::<weight::WeightView>()?;
    module.add_class::<calls::LinearCall>()?;
    module.add_function(wrap_pyfunction!(torch::use_torch, module)?)?;
    operations::register(module)?;
    norms::register(module)?;
    cuda::register(module)
}
