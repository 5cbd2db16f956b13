//! The exception classes, and the one place where the core's errors become them.

use std::panic::{AssertUnwindSafe, catch_unwind};

use lowbit_core::Error;
use pyo3::exceptions::{PyException, PyNotImplementedError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple, PyType};

/// The classes of this package, made once: each but the first also is one of Python's own.
struct Classes {
    base: Py<PyType>,
    invalid_argument: Py<PyType>,
    unsupported: Py<PyType>,
    cuda: Py<PyType>,
}

static CLASSES: PyOnceLock<Classes> = PyOnceLock::new();

fn classes(py: Python<'_>) -> PyResult<&Classes> {
    CLASSES.get_or_try_init(py, || {
        let exception = py.get_type::<PyException>();
        let base = class(py, "LowbitError", &[exception], "Anything that this package raises.")?;
        let derived = |name: &str, other, doc: &str| class(py, name, &[base.clone(), other], doc);
        let invalid_argument = derived(
            "InvalidArgument",
            py.get_type::<PyValueError>(),
            "An argument outside what the function takes; the message names it, what it got and what it takes.",
        )?;
        let unsupported = derived(
            "Unsupported",
            py.get_type::<PyNotImplementedError>(),
            "Well formed, but not served; the message says what to use instead.",
        )?;
        let cuda = derived(
            "CudaError",
            py.get_type::<PyRuntimeError>(),
            "CUDA is missing or failed; the message carries its own name for the error.",
        )?;
        Ok(Classes {
            base: base.unbind(),
            invalid_argument: invalid_argument.unbind(),
            unsupported: unsupported.unbind(),
            cuda: cuda.unbind(),
        })
    })
}

fn class<'py>(py: Python<'py>, name: &str, bases: &[Bound<'py, PyType>], doc: &str) -> PyResult<Bound<'py, PyType>> {
    let namespace = PyDict::new(py);
    namespace.set_item("__module__", "lowbit_rs")?;
    namespace.set_item("__doc__", doc)?;
    let made = py.get_type::<PyType>().call1((name, PyTuple::new(py, bases)?, namespace))?;
    Ok(made.cast_into::<PyType>()?)
}

/// Adds the classes to the module.
pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    let classes = classes(py)?;
    module.add("LowbitError", classes.base.bind(py))?;
    module.add("InvalidArgument", classes.invalid_argument.bind(py))?;
    module.add("Unsupported", classes.unsupported.bind(py))?;
    module.add("CudaError", classes.cuda.bind(py))
}

/// The Python exception of a core error.
pub(crate) fn to_python(error: &Error) -> PyErr {
    Python::attach(|py| {
        let classes = match classes(py) {
            Ok(classes) => classes,
            Err(failure) => return failure,
        };
        let class = match error {
            Error::InvalidArgument { .. } | Error::NonFinite { .. } => &classes.invalid_argument,
            Error::Unsupported { .. } => &classes.unsupported,
            Error::Cuda { .. } => &classes.cuda,
        };
        PyErr::from_type(class.bind(py).clone(), error.to_string())
    })
}

/// Runs `work` without the interpreter. A panic, which is a bug, becomes a `LowbitError` and not an abort.
pub(crate) fn run<T: Send>(py: Python<'_>, work: impl FnOnce() -> lowbit_core::Result<T> + Send) -> PyResult<T> {
    let outcome = py.detach(|| catch_unwind(AssertUnwindSafe(work)));
    match outcome {
        Ok(result) => result.map_err(|error| to_python(&error)),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
            let message = format!("internal error, please report it: {text}");
            Err(PyErr::from_type(classes(py)?.base.bind(py).clone(), message))
        }
    }
}
