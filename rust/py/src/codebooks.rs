//! Codebook tables: what `lowbit_rs.codebooks` wraps.

use lowbit_core::codebook::{self, Metric};
use pyo3::prelude::*;

use crate::buffers::{Buffer, slice};
use crate::errors::run;

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(nf4, module)?)?;
    module.add_function(wrap_pyfunction!(fp4, module)?)?;
    module.add_function(wrap_pyfunction!(int4, module)?)?;
    module.add_function(wrap_pyfunction!(normal_float, module)?)?;
    module.add_function(wrap_pyfunction!(dynamic_map, module)?)?;
    module.add_function(wrap_pyfunction!(quantile, module)?)?;
    module.add_function(wrap_pyfunction!(block_optimal, module)?)?;
    module.add_function(wrap_pyfunction!(fit, module)?)?;
    module.add_function(wrap_pyfunction!(fit_blocks, module)?)
}

#[pyfunction]
fn nf4() -> Vec<f32> {
    codebook::nf4().values().to_vec()
}

#[pyfunction]
fn fp4() -> Vec<f32> {
    codebook::fp4().values().to_vec()
}

#[pyfunction]
fn int4() -> Vec<f32> {
    codebook::int4().values().to_vec()
}

#[pyfunction]
fn normal_float(py: Python<'_>, bits: u32) -> PyResult<Vec<f32>> {
    run(py, || codebook::normal_float(bits))
}

#[pyfunction]
fn dynamic_map() -> Vec<f32> {
    codebook::dynamic_map().to_vec()
}

/// `samples` are fp32.
#[pyfunction]
fn quantile(py: Python<'_>, samples: Buffer, bits: u32) -> PyResult<Vec<f32>> {
    // SAFETY: the caller lends its array for this call.
    run(py, || codebook::quantile(unsafe { slice(samples) }?, bits))
}

#[pyfunction]
fn block_optimal(py: Python<'_>, block_size: usize, bits: u32, metric: &str, signed: bool) -> PyResult<Vec<f32>> {
    run(py, || codebook::block_optimal(block_size, bits, Metric::parse(metric)?, signed))
}

/// `samples` and `weights` are fp32.
#[pyfunction]
fn fit(py: Python<'_>, samples: Buffer, bits: u32, weights: Option<Buffer>) -> PyResult<Vec<f32>> {
    run(py, || {
        // SAFETY: the caller lends its arrays for this call.
        let (samples, weights) = unsafe { (slice(samples)?, weights.map(|weights| slice(weights)).transpose()?) };
        codebook::fit(samples, bits, weights)
    })
}

/// `samples` are fp32, rows of `row_length` one after another.
#[pyfunction]
fn fit_blocks(
    py: Python<'_>,
    samples: Buffer,
    row_length: usize,
    block_size: usize,
    bits: u32,
    signed: bool,
) -> PyResult<Vec<f32>> {
    // SAFETY: the caller lends its array for this call.
    run(py, || codebook::fit_blocks(unsafe { slice(samples) }?, row_length, block_size, bits, signed))
}
