/// @file
/// Marks what libmamba_ssm.so exports; everything else is hidden.
#pragma once

/// Before a declaration: it is part of the library's interface.
#define MAMBA_SSM_API __attribute__((visibility("default")))
