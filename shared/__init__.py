"""The ground floor: values, maths and file formats that both towers stand on; imports neither of them."""
