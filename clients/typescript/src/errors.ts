/** The error of a call, with the details that the server sends. */

import { Code, ConnectError } from "@connectrpc/connect";

import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "./gen/google/rpc/error_details_pb.js";

export { Code };

/** An invalid field of a request. */
export interface FieldViolation {
  /** Its path, such as `sampling.temperature`. */
  field: string;
  /** What is wrong with it, and the remedy. */
  description: string;
  /** `CONTEXT_LENGTH_EXCEEDED` if the prompt and the output do not fit in the context, otherwise empty. */
  reason: string;
}

/** A call that failed; `cause` is the error of Connect. */
export class MptGrpcError extends Error {
  override readonly name = "MptGrpcError";
  readonly code: Code;
  /** The server's stable name for the error, such as `OVERLOADED`; empty if it sent none. */
  readonly reason: string;
  /** All invalid fields. */
  readonly violations: FieldViolation[];
  /** How long to wait before trying again, if the server says so. */
  readonly retryAfterMs: number | undefined;

  constructor(error: ConnectError) {
    super(error.rawMessage, { cause: error });
    this.code = error.code;
    this.reason = error.findDetails(ErrorInfoSchema)[0]?.reason ?? "";
    const violations = error.findDetails(BadRequestSchema).flatMap((detail) => detail.fieldViolations);
    this.violations = violations.map(({ field, description, reason }) => ({ field, description, reason }));
    const delay = error.findDetails(RetryInfoSchema)[0]?.retryDelay;
    this.retryAfterMs = delay && Number(delay.seconds) * 1000 + delay.nanos / 1e6;
  }
}

/** Returns the error to throw for one of a call. */
export function decoded(error: unknown): MptGrpcError {
  return new MptGrpcError(ConnectError.from(error));
}
