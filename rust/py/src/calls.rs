//! `LinearCall`: the product of a layer without the steps that come out the same at every call.

use std::sync::{Arc, Mutex, PoisonError};

use lowbit_core::Result;
use lowbit_core::cpu::{self, ActivationFormat, Activations};
use lowbit_core::cuda::{self, DeviceActivations, DeviceFloats, Queue};
use lowbit_core::dtype::Dtype;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString, PyTuple};

use crate::buffers::{floats, floats_mut};
use crate::cuda::CudaWeight;
use crate::errors::run;
use crate::exchange::{Exchange, Memory, Place};
use crate::torch::Torch;
use crate::weight::WeightView;

/// Multiplies with the weight that a dict of tensors holds, as long as these lie where they lay at the call before.
///
/// A call reads where every tensor lies now, how long it is and of what: that is all that a view of a weight is made of.
/// The view of the last call is used again if all of it is the same, so nothing can go stale, whatever became of the
/// tensors in between. `None` stands for everything that the ordinary way has to serve, or to refuse with a reason: calls
/// that somebody watches, first of all.
#[pyclass(module = "lowbit_rs._native", frozen)]
pub(crate) struct LinearCall {
    keys: Vec<Py<PyString>>,
    may_overlap: bool,
    last: Mutex<Option<Arc<Known>>>,
}

/// A view, and the tensors that it was made of.
struct Known {
    tensors: Vec<Memory>,
    view: View,
}

enum View {
    Cpu(Py<WeightView>),
    Cuda(Py<CudaWeight>),
}

/// Checked operands of one product.
struct Operands {
    x: Memory,
    dtype: Dtype,
    tokens: usize,
    bias: Option<(Memory, Dtype)>,
}

#[pymethods]
impl LinearCall {
    /// For a weight whose tensors have these keys, in the order of fields.
    #[new]
    fn new(keys: Vec<Py<PyString>>, may_overlap: bool) -> Self {
        Self { keys, may_overlap, last: Mutex::new(None) }
    }

    /// Copies and pickles know their tensors anew.
    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let keys: Vec<_> = self.keys.iter().map(|key| key.clone_ref(py)).collect();
        (py.get_type::<Self>(), (keys, self.may_overlap)).into_pyobject(py)
    }

    /// `x @ weight.T + bias` for the `QuantLinear` whose `__dict__` is `state`, or None. `owner._view()` makes a view where
    /// the last one does not fit.
    fn run<'py>(
        &self,
        owner: &Bound<'py, PyAny>,
        state: &Bound<'py, PyDict>,
        x: &Bound<'py, PyAny>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let py = x.py();
        let Some(torch) = Torch::get(py) else { return Ok(None) };
        let Some(parameters) = state.get_item(intern!(py, "_parameters"))? else { return Ok(None) };
        let (parameters, Some(activation)) = (parameters.cast::<PyDict>()?, state.get_item(intern!(py, "activation"))?)
        else {
            return Ok(None);
        };
        let activation = activation.cast::<PyString>()?.to_str()?;
        let threshold = if activation == "none" { None } else { state.get_item(intern!(py, "threshold"))? };
        let threshold: Option<f32> = threshold.map_or(Ok(None), |value| value.extract())?;
        let is_there = |value: &Bound<'_, PyAny>| !value.is_none();
        let is_converted = state.get_item(intern!(py, "compute_dtype"))?.is_some_and(|dtype| is_there(&dtype));
        let is_permuted = parameters.get_item(intern!(py, "weight_permutation"))?.is_some_and(|order| is_there(&order));
        if is_converted || is_permuted {
            return Ok(None);
        }
        let bias = parameters.get_item(intern!(py, "bias"))?.filter(is_there);
        if !torch.is_plain_call(x, bias.as_ref())? {
            return Ok(None);
        }
        let exchange = &torch.exchange;
        let mut shape = Vec::with_capacity(4);
        let Some(memory) = exchange.read(x, &mut shape) else { return Ok(None) };
        // Held until the work is queued or done, whatever other threads do to the dict.
        let Some(tensors) = self.tensors(parameters)? else { return Ok(None) };
        let Some(known) = self.known(exchange, owner, &tensors)? else { return Ok(None) };
        let (rows, cols) = known.view.shape();
        let Some(width) = shape.last_mut().filter(|width| **width == cols as i64) else { return Ok(None) };
        *width = rows as i64;
        let place = known.tensors[0].place;
        let Some(operands) = Operands::new(exchange, memory, bias.as_ref(), place, (rows, cols)) else {
            return Ok(None);
        };
        if place.is_cuda() && !is_quick_on_cuda(operands.tokens, activation) {
            return Ok(None);
        }
        let Some((out, result)) = torch.empty(x, place, &shape)? else { return Ok(None) };
        match &known.view {
            View::Cpu(view) => {
                let threads = torch.threads(py)?;
                let view = view.get();
                run(py, || {
                    let activation = ActivationFormat::parse(activation, threshold.unwrap_or(0.0))?;
                    operands.multiply_on_cpu(view, activation, result, threads)
                })?;
            }
            View::Cuda(view) => {
                let stream = exchange.current_stream(py, place)?;
                let (view, may_overlap) = (view.get(), self.may_overlap);
                run(py, || operands.multiply_on_cuda(view, stream, may_overlap, result))?;
            }
        }
        Ok(Some(out))
    }
}

impl LinearCall {
    fn tensors<'py>(&self, parameters: &Bound<'py, PyDict>) -> PyResult<Option<Vec<Bound<'py, PyAny>>>> {
        self.keys.iter().map(|key| parameters.get_item(key)).collect()
    }

    /// The view of these tensors: that of the last call, or one that is made now.
    fn known(
        &self,
        exchange: &Exchange,
        owner: &Bound<'_, PyAny>,
        tensors: &[Bound<'_, PyAny>],
    ) -> PyResult<Option<Arc<Known>>> {
        let mut shape = Vec::with_capacity(4);
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(last) = last {
            let mut pairs = tensors.iter().zip(&last.tensors);
            if pairs.all(|(tensor, memory)| exchange.read(tensor, &mut shape).as_ref() == Some(memory)) {
                return Ok(Some(last));
            }
        }
        let memory: Option<Vec<Memory>> = tensors.iter().map(|tensor| exchange.read(tensor, &mut shape)).collect();
        let Some(memory) = memory.filter(|memory| memory.iter().all(|part| part.place == memory[0].place)) else {
            return Ok(None);
        };
        let view = owner.call_method0(intern!(owner.py(), "_view"))?;
        let view = match view.cast::<WeightView>() {
            Ok(view) => View::Cpu(view.clone().unbind()),
            Err(_) => View::Cuda(view.cast::<CudaWeight>()?.clone().unbind()),
        };
        let known = Arc::new(Known { tensors: memory, view });
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&known));
        Ok(Some(known))
    }
}

/// Whether the kernel for few tokens serves a call, whatever rounding it allows: "auto" rounds no fewer, and "int8" may have
/// to be refused.
fn is_quick_on_cuda(tokens: usize, activation: &str) -> bool {
    tokens <= cuda::MAX_TOKENS && activation != "int8"
}

impl View {
    fn shape(&self) -> (usize, usize) {
        match self {
            Self::Cpu(view) => view.get().shape(),
            Self::Cuda(view) => view.get().shape(),
        }
    }
}

impl Operands {
    fn new(
        exchange: &Exchange,
        x: Memory,
        bias: Option<&Bound<'_, PyAny>>,
        place: Place,
        (rows, cols): (usize, usize),
    ) -> Option<Self> {
        let dtype = x.element.float().filter(|_| x.place == place && cols > 0)?;
        let mut shape = Vec::with_capacity(4);
        let bias = match bias {
            None => None,
            Some(bias) => {
                let memory = exchange.read(bias, &mut shape)?;
                let fits = memory.place == place && shape == [rows as i64];
                Some((memory, memory.element.float().filter(|_| fits)?))
            }
        };
        Some(Self { x, dtype, tokens: x.len / cols, bias })
    }

    fn multiply_on_cpu(
        &self,
        view: &WeightView,
        activation: ActivationFormat,
        out: Memory,
        threads: usize,
    ) -> Result<()> {
        let stride = self.x.len.checked_div(self.tokens).unwrap_or(0);
        // SAFETY: the caller holds the tensors, and torch gave `out` to nobody else.
        unsafe {
            let bias = self.bias.map(|(bias, dtype)| floats((bias.address, bias.len), dtype)).transpose()?;
            let x =
                Activations { values: floats((self.x.address, self.x.len), self.dtype)?, tokens: self.tokens, stride };
            let out = floats_mut((out.address, out.len), self.dtype)?;
            cpu::linear(&view.packed()?, x, activation, bias, out, threads)
        }
    }

    fn multiply_on_cuda(&self, view: &CudaWeight, stream: usize, may_overlap: bool, out: Memory) -> Result<()> {
        let floats = |memory: Memory, dtype| DeviceFloats::new(memory.address as u64, memory.len, dtype);
        let stride = self.x.len.checked_div(self.tokens).unwrap_or(0);
        let x = DeviceActivations { values: floats(self.x, self.dtype), tokens: self.tokens, stride };
        let bias = self.bias.map(|(bias, dtype)| floats(bias, dtype));
        let queue = Queue { may_overlap, ..view.queue(stream)? };
        // SAFETY: all tensors are on the weight's device, and torch keeps their memory until the stream is done.
        unsafe { cuda::linear(queue, view.weight(), x, bias, floats(out, self.dtype)) }
    }
}
