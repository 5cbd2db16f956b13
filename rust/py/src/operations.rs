//! Quantize, dequantize and multiply.

use half::{bf16, f16};
use lowbit_core::cpu::{self, ActivationFormat, Activations, Isa, NonFinite, Source};
use lowbit_core::dtype::Dtype;
use lowbit_core::{Error, Result};
use pyo3::prelude::*;

use crate::buffers::{Buffer, FloatBuffer, floats, floats_mut, slice};
use crate::errors::{run, to_python};
use crate::weight::WeightView;

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(quantize, module)?)?;
    module.add_function(wrap_pyfunction!(dequantize, module)?)?;
    module.add_function(wrap_pyfunction!(dequantize_rows, module)?)?;
    module.add_function(wrap_pyfunction!(linear, module)?)?;
    module.add_function(wrap_pyfunction!(rounded_from, module)?)?;
    module.add_function(wrap_pyfunction!(linear_grad_input, module)?)?;
    module.add_function(wrap_pyfunction!(isa, module)?)?;
    module.add_function(wrap_pyfunction!(available_isas, module)?)?;
    module.add_function(wrap_pyfunction!(force_isa, module)?)
}

/// Packs the [experts, rows, cols] float tensor at an address, strides in elements, into `out`.
#[pyfunction]
#[allow(clippy::too_many_arguments)] // a strided tensor is four of them
fn quantize(
    py: Python<'_>,
    source: usize,
    dtype: &str,
    shape: [usize; 3],
    strides: [isize; 3],
    nonfinite: &str,
    out: &WeightView,
    threads: usize,
) -> PyResult<()> {
    run(py, || {
        let dtype = Dtype::parse("tensor", dtype)?;
        let nonfinite = NonFinite::parse(nonfinite)?;
        let layout = out.layout()?;
        if shape[0] * shape[1] != layout.rows || shape[2] != layout.cols {
            let expected = format!("{} rows of {}", layout.rows, layout.cols);
            return Err(Error::invalid("tensor", format!("shape {shape:?}"), expected));
        }
        // SAFETY: the caller lends its tensors for this call: the source to be read, the views' to be written.
        unsafe {
            let out = out.packed_mut()?;
            match dtype {
                Dtype::Float32 => {
                    cpu::quantize(Source::new(source as *const f32, shape, strides), out, nonfinite, threads)
                }
                Dtype::Float16 => {
                    cpu::quantize(Source::new(source as *const f16, shape, strides), out, nonfinite, threads)
                }
                Dtype::Bfloat16 => {
                    cpu::quantize(Source::new(source as *const bf16, shape, strides), out, nonfinite, threads)
                }
            }
        }
    })
}

/// Unpacks the whole weight into `out`, [rows, cols].
#[pyfunction]
fn dequantize(py: Python<'_>, weight: &WeightView, out: FloatBuffer, threads: usize) -> PyResult<()> {
    run(py, || {
        let dtype = Dtype::parse("out", &out.2)?;
        // SAFETY: the caller lends its tensors for this call.
        unsafe { cpu::dequantize(&weight.packed()?, floats_mut((out.0, out.1), dtype)?, threads) }
    })
}

/// Unpacks the rows at the int64 indices `rows` into `out`, [len(rows), cols].
#[pyfunction]
fn dequantize_rows(
    py: Python<'_>,
    weight: &WeightView,
    rows: Buffer,
    out: FloatBuffer,
    threads: usize,
) -> PyResult<()> {
    run(py, || {
        let dtype = Dtype::parse("out", &out.2)?;
        // SAFETY: the caller lends its tensors for this call.
        unsafe { cpu::dequantize_rows(&weight.packed()?, slice(rows)?, floats_mut((out.0, out.1), dtype)?, threads) }
    })
}

/// `out[tokens, rows] = x[tokens, cols] @ weight.T + bias`, rows of x `x_row_stride` elements apart, x rounded as
/// `activation` says, but for columns with a magnitude of `threshold` or more; 0 is none.
#[pyfunction]
#[pyo3(signature = (weight, x, tokens, x_row_stride, activation, threshold, bias, out, threads))]
#[allow(clippy::too_many_arguments)] // three tensors with their strides
fn linear(
    py: Python<'_>,
    weight: &WeightView,
    x: FloatBuffer,
    tokens: usize,
    x_row_stride: usize,
    activation: &str,
    threshold: f32,
    bias: Option<FloatBuffer>,
    out: FloatBuffer,
    threads: usize,
) -> PyResult<()> {
    run(py, || {
        let (out_dtype, activation) = (Dtype::parse("out", &out.2)?, ActivationFormat::parse(activation, threshold)?);
        // SAFETY: the caller lends its tensors for this call.
        unsafe {
            let bias = match bias {
                Some(bias) => Some(floats((bias.0, bias.1), Dtype::parse("bias", &bias.2)?)?),
                None => None,
            };
            let x = activations("x", &x, tokens, x_row_stride)?;
            cpu::linear(&weight.packed()?, x, activation, bias, floats_mut((out.0, out.1), out_dtype)?, threads)
        }
    })
}

/// From how many tokens on activations of a dtype are rounded to int8 as `activation` says; None if never.
#[pyfunction]
fn rounded_from(weight: &WeightView, activation: &str, dtype: &str) -> PyResult<Option<usize>> {
    let from = || {
        let (dtype, format) = (Dtype::parse("dtype", dtype)?, ActivationFormat::parse(activation, 0.0)?);
        // SAFETY: the caller lends its tensors for this call.
        let weight = unsafe { weight.packed()? };
        cpu::rounded_from(&weight, format, dtype)
    };
    from().map_err(|error| to_python(&error))
}

/// `out[tokens, cols] = grad[tokens, rows] @ weight`, rows of grad `grad_row_stride` elements apart.
#[pyfunction]
fn linear_grad_input(
    py: Python<'_>,
    weight: &WeightView,
    grad: FloatBuffer,
    tokens: usize,
    grad_row_stride: usize,
    out: FloatBuffer,
    threads: usize,
) -> PyResult<()> {
    run(py, || {
        let out_dtype = Dtype::parse("out", &out.2)?;
        // SAFETY: the caller lends its tensors for this call.
        unsafe {
            let grad = activations("grad", &grad, tokens, grad_row_stride)?;
            cpu::linear_grad_input(&weight.packed()?, grad, floats_mut((out.0, out.1), out_dtype)?, threads)
        }
    })
}

/// # Safety
/// The buffer is alive and nobody writes to it while the result lives.
pub(crate) unsafe fn activations<'a>(
    argument: &'static str,
    buffer: &FloatBuffer,
    tokens: usize,
    stride: usize,
) -> Result<Activations<'a>> {
    let dtype = Dtype::parse(argument, &buffer.2)?;
    // SAFETY: handed on to the caller.
    Ok(Activations { values: unsafe { floats((buffer.0, buffer.1), dtype)? }, tokens, stride })
}

/// The instruction set that CPU kernels run on.
#[pyfunction]
fn isa() -> PyResult<&'static str> {
    Isa::current().map(Isa::name).map_err(|error| to_python(&error))
}

/// The instruction sets of this machine, best first.
#[pyfunction]
fn available_isas() -> Vec<&'static str> {
    Isa::available().into_iter().map(Isa::name).collect()
}

/// Makes CPU kernels run on the named instruction set, in the whole process; None undoes it. For tests.
#[pyfunction]
#[pyo3(signature = (name=None))]
fn force_isa(name: Option<&str>) -> PyResult<()> {
    let isa = name.map(|name| Isa::parse("name", name)).transpose().map_err(|error| to_python(&error))?;
    Isa::force(isa);
    Ok(())
}
