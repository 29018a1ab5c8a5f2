{{/* What every pod has in common: the restricted profile of pod security, and nothing of the Kubernetes API. */}}

{{- define "lacre.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  fsGroup: 65532
  fsGroupChangePolicy: OnRootMismatch # keys written with mode 0600 keep it
  seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "lacre.container" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* A component's values: where its pods may run. */}}
{{- define "lacre.placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- end -}}

{{- define "lacre.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* NATS' authority: a file, and the variable by which OpenSSL adds it to the system's folder of them. */}}
{{- define "lacre.ca.env" -}}
{{- if include "lacre.nats.ca" . }}
- name: SSL_CERT_FILE
  value: /etc/lacre/nats-ca/ca.crt
{{- end }}
{{- end -}}

{{- define "lacre.ca.mount" -}}
{{- if include "lacre.nats.ca" . }}
- {name: nats-ca, mountPath: /etc/lacre/nats-ca, readOnly: true}
{{- end }}
{{- end -}}

{{- define "lacre.ca.volume" -}}
{{- with include "lacre.nats.ca" . }}
- name: nats-ca
  secret: {secretName: {{ . | quote }}, items: [{key: ca.crt, path: ca.crt}]}
{{- end }}
{{- end -}}

{{/* (list $ "component" values): the account whose annotations a cloud reads. */}}
{{- define "lacre.serviceAccount" -}}
{{- $root := index . 0 }}
{{- $values := index . 2 }}
apiVersion: v1
kind: ServiceAccount
metadata:
  name: {{ include "lacre.fullname" $root }}-{{ index . 1 }}
  labels: {{- include "lacre.labels" (list $root (index . 1)) | nindent 4 }}
  {{- with $values.serviceAccount.annotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
automountServiceAccountToken: false
{{- end -}}
