"""Files that are copied into exports of models with Gengram, for transformers'
`trust_remote_code`. They stand alone: they import nothing from this package, and nothing in this
package imports them."""
