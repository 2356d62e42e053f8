// Marks what libmamba_ssm.so exports; everything else is hidden.
#pragma once

#define MAMBA_SSM_API __attribute__((visibility("default")))
